// The key of a symbol in a formula, as the table writes it: β_1, hat m, n_in; or ''.
function keyOf(e) {
  const [first, second] = e.children;
  if (e.localName === 'mi' || e.localName === 'mtext') return e.textContent.trim();
  if (e.localName === 'mover' && '^\u0302'.includes(second.textContent.trim()))
    return 'hat ' + keyOf(first);
  if (e.localName === 'msub' || e.localName === 'msubsup')
    return keyOf(first) + '_' + second.textContent.trim();
  return '';
}

// For those who hear the button: a formula has no name of its own.
function nameOf(symbol) {
  const read = symbol.written || symbol.key.replace(/^hat (.)/, '$1 hat');
  return [read.replace('_', ''), ...symbol.names.slice(0, 2)].join(' ');
}

// Text as a part of a regular expression.
function escaped(text) { return text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'); }

// Which symbol of the table does this key mean at this place? A symbol that means it in
// this section goes before one that means it in the whole chapter.
function symbolAt(symbols, test, place) {
  const here = symbols.filter(s => test(s) && s.scopes.some(e => e.contains(place)));
  return here.sort((a, b) => b.places.length - a.places.length)[0];
}

// Mark the symbols in a formula, or in a part of one.
function markFormula(e, symbols) {
  const key = keyOf(e);
  const symbol = key && symbolAt(symbols, s => s.key === key, e);
  if (symbol) {
    // a power is not a part of the symbol
    const whole = e.localName !== 'msubsup';
    const parts = whole ? [e] : [e.children[0], e.children[1]];
    parts.forEach(part => { part.dataset.sym = symbol.i; });
    if (whole) return;
  }
  for (const child of e.children) {
    const skip = child.dataset.sym !== undefined || child.localName === 'annotation';
    if (!skip) markFormula(child, symbols);
  }
}

// What finds these words in code or text: no part of a longer one, and of attributes
// only those of `self`.
function finder(words) {
  const any = [...new Set(words)].sort((a, b) => b.length - a.length).map(escaped);
  return new RegExp(
    '(?<!\\w|(?<!self)\\.)(?:' + any.join('|') + ')(?![\\w\u0302₀-₉])', 'g');
}

// Names or words in a piece of code or text: wrapped in place, so that it stays the
// same. `means(symbol, word)` says whether a word stands for a symbol.
function markText(e, symbols, find, means) {
  const nodes = document.createTreeWalker(e, NodeFilter.SHOW_TEXT), parts = [];
  for (let at = 0, node; (node = nodes.nextNode()); at += node.length)
    parts.push({node, at});
  const hits = [...e.textContent.matchAll(find)].reverse();
  for (const hit of hits) {
    const end = hit.index + hit[0].length;
    const part = parts.find(
      p => p.at <= hit.index && end <= p.at + p.node.length);
    const symbol = symbolAt(symbols, s => means(s, hit[0]), e);
    if (!part || !symbol) continue;
    const name = part.node.splitText(hit.index - part.at);
    name.splitText(hit[0].length);
    const mark = document.createElement('span');
    mark.dataset.sym = symbol.i;
    name.replaceWith(mark);
    mark.append(name);
  }
}

// Names in blocks of code, and in the text; words in the captions of pictures.
function markTexts(main, symbols) {
  const mark = (where, words) => {
    const all = symbols.flatMap(words), find = finder(all);
    if (all.length) main.querySelectorAll(where).forEach(
      e => markText(e, symbols, find, (s, word) => words(s).includes(word)));
  };
  mark('pre code.sourceCode > span', s => s.words);
  mark('figcaption', s => s.written ? [...s.figures, s.written] : s.figures);
  main.querySelectorAll('code:not(pre code, .sym code)').forEach(code => {
    const symbol = symbolAt(symbols, s => s.words.includes(code.textContent), code);
    if (symbol) code.dataset.sym = symbol.i;
  });
}

// Sliders by the name of their parameter, legends and labels by their words.
function markFigures(main, symbols) {
  const says = (text, s) => s.figures.includes(text) ||
    (s.written && new RegExp(escaped(s.written) + '(?![₀-₉])').test(text));
  main.querySelectorAll('.nnx-d > ul li, .nnx-c > label, .nnx-c > span[id]')
    .forEach(part => {
      const id = part.htmlFor || part.id.replace(/-n$/, '');
      const name = id.slice(id.lastIndexOf('-') + 1), text = part.textContent.trim();
      const test = s => s.names.includes(name) || says(text, s);
      const symbol = symbolAt(symbols, test, part);
      if (symbol) part.dataset.sym = symbol.i;
    });
}

// Letters in pictures: the list below a picture says where they stand, in percent. Each
// gets a frame, in a layer over the picture; the picture itself stays as it is.
function markPictures(main) {
  const images = [...main.querySelectorAll('.cell-output img')];
  main.querySelectorAll('.sym-picture[data-boxes]').forEach(list => {
    const above = e =>
      e.compareDocumentPosition(list) & Node.DOCUMENT_POSITION_FOLLOWING;
    const image = images.filter(above).pop();
    if (!image) return;
    const [whole, layer] = [1, 2].map(() => document.createElement('span'));
    whole.className = 'sym-over';
    // for those who see: there are buttons
    layer.setAttribute('aria-hidden', 'true');
    list.dataset.boxes.split(', ').forEach(box => {
      const [symbol, ...place] = box.split(' '), mark = document.createElement('span');
      mark.dataset.sym = symbol;
      ['left', 'top', 'width', 'height'].forEach((side, i) => {
        mark.style[side] = place[i] + '%';
      });
      layer.append(mark);
    });
    const {margin, verticalAlign} = getComputedStyle(image);
    // so that nothing moves
    Object.assign(whole.style, {margin, verticalAlign});
    image.style.margin = '0';
    image.replaceWith(whole);
    whole.append(image, layer);
  });
}

// The elements that are marked as symbol number i.
function of(i) { return '[data-sym="' + i + '"]'; }

// The symbols of a formula's list become buttons; without this script they are text.
function makeButtons(main, symbols) {
  main.querySelectorAll('.sym-list .sym').forEach(text => {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'sym';
    button.dataset.sym = text.dataset.sym;
    button.setAttribute('aria-pressed', 'false');
    button.setAttribute('aria-label', nameOf(symbols[text.dataset.sym]));
    button.append(...text.childNodes);
    text.replaceWith(button);
  });
  return main.querySelectorAll('button.sym');
}

// Start the symbols of a page; table: their keys, names, words in figures and places.
function startSymbols(table) {
  const main = document.querySelector('main');
  const symbols = table.map((symbol, i) => {
    const places = symbol.places.map(id => document.getElementById(id)).filter(Boolean);
    const {names, written} = symbol, words = written ? [...names, written] : names;
    const scopes = symbol.places.length ? places : [main];
    return {...symbol, i, words, scopes};
  });
  let lit, pinned, ready;

  // at the first touch, so that nobody waits for it
  function mark() {
    if (ready) return;
    ready = true;
    main.querySelectorAll('math').forEach(math => {
      if (!math.closest('.sym-list')) markFormula(math, symbols);
    });
    markTexts(main, symbols);
    markFigures(main, symbols);
    markPictures(main);
  }

  function light(i) {
    if (i === lit) return;
    lit = i;
    main.querySelectorAll('.sym-on').forEach(e => e.classList.remove('sym-on'));
    if (i === undefined) return;
    main.querySelectorAll(of(i)).forEach(e => e.classList.add('sym-on'));
  }

  function pin(i) {
    pinned = i;
    main.querySelectorAll('button.sym').forEach(button => {
      button.setAttribute('aria-pressed', String(button.dataset.sym === i));
    });
    light(i);
  }

  const says = document.createElement('p');
  says.className = 'visually-hidden';
  says.setAttribute('aria-live', 'polite');
  main.append(says);
  function tell(i) {
    const count = (holder, one, many) => {
      const n = [...main.querySelectorAll(holder)].filter(
        e => e.matches(of(i)) || e.querySelector(of(i))).length;
      return n + ' ' + (n === 1 ? one : many);
    };
    const lines = 'pre code > span, code:not(pre code, .sym code)';
    says.textContent = 'Marked in ' + count('math', 'formula', 'formulas') + ', ' +
      count(lines, 'line of code', 'lines of code') + ' and ' +
      count('.nnx, .sym-picture', 'figure', 'figures') + '.';
  }

  makeButtons(main, symbols).forEach(button => {
    button.addEventListener('focus', () => { mark(); light(button.dataset.sym); });
    button.addEventListener('blur', () => light(pinned));
  });
  const symbolOf = e => e.target.closest && e.target.closest('[data-sym]');
  main.addEventListener('pointerover', e => {
    mark();
    const symbol = symbolOf(e);
    light(symbol && e.pointerType === 'mouse' ? symbol.dataset.sym : pinned);
  });
  main.addEventListener('click', e => {
    mark();
    const symbol = symbolOf(e);
    // the label of a slider moves the focus
    if (symbol && symbol.closest('.nnx')) return;
    if (!symbol) { if (pinned !== undefined) pin(undefined); return; }
    const same = symbol.dataset.sym === pinned;
    pin(same ? undefined : symbol.dataset.sym);
    if (same) says.textContent = 'No longer marked.'; else tell(pinned);
  });
  document.addEventListener('keydown', e => {
    if (e.key === 'Escape' && pinned !== undefined) pin(undefined);
  });
}
