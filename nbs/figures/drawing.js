// The view of `draw_view`: a pad, what the network sees of it, and what it answers.

const percent = p => `${Math.round(100 * p)} %`;

// Paint numbers as grey levels from `low` to `high`; what is lower is transparent.
function paintLevels(canvas, values, wide, [low, high]) {
  canvas.width = wide;
  canvas.height = values.length / wide;
  const pen = canvas.getContext('2d');
  const image = pen.createImageData(canvas.width, canvas.height);
  values.forEach((v, i) => {
    image.data.fill(255 * (v - low) / (high - low || 1), 4 * i, 4 * i + 3);
    image.data[4 * i + 3] = v < low ? 0 : 255;
  });
  pen.putImageData(image, 0, 0);
}

// All maps of a layer in one picture, up to 16 in a row, with a gap between them.
function paintMaps(canvas, { data, shape: [n, h, w] }) {
  const columns = Math.min(n, 16), rows = Math.ceil(n / columns);
  const wide = columns * (w + 1) - 1;
  const sheet = new Float32Array(wide * (rows * (h + 1) - 1)).fill(-1);
  const most = data.reduce((a, v) => Math.max(a, v), 0);
  data.forEach((v, i) => {
    const x = i % w, y = Math.floor(i / w) % h, map = Math.floor(i / (w * h));
    const left = map % columns * (w + 1), top = Math.floor(map / columns) * (h + 1);
    sheet[(top + y) * wide + left + x] = Math.max(v, 0);
  });
  paintLevels(canvas, sheet, wide, [0, most]);
}

function element(tag, text = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

// A sentence about the two likeliest classes.
function inWords(classes, probabilities) {
  const order = classes.map((_, i) => i)
    .sort((a, b) => probabilities[b] - probabilities[a]);
  const [first, second] = order.map(i => `${classes[i]}, ${percent(probabilities[i])}`);
  return !(probabilities[order[1]] >= 0.005) ? `${first}.` : `${first}; then ${second}.`;
}

function drawing({ id, network, pictures }) {
  once(id, figure => {
    const part = name => figure.querySelector(`[data-part=${name}]`);
    const chosen = name => figure.querySelector(`[data-part=${name}] :checked`).value;
    let known = readNetwork(network), levels = null, answer = null, wanted = false;
    let job = 0, later = 0;

    // what is said aloud waits until the hand rests
    function say(words) {
      clearTimeout(later);
      later = setTimeout(() => { part('says').textContent = words; }, 600);
    }

    const canvas = part('pad');
    const tool = () => ({ size: +chosen('size'), erase: chosen('tool') === 'erase' });
    const pad = drawingPad(canvas, part('cursor'), tool, request, say);

    function request() { // at most one answer for each picture that the screen shows
      job++; // a covering that is under way has another picture
      if (!wanted) requestAnimationFrame(update);
      wanted = true;
    }

    function update() {
      wanted = false;
      const start = performance.now(), view = part('fit').checked ? fitted : asItIs;
      levels = view(pad.levels(), pad.side);
      const open = !part('maps').hidden, seen = open && levels ? [] : null;
      answer = levels && softmax(known.logits(levels, seen));
      const time = performance.now() - start;
      paintLevels(part('seen'), levels || new Float32Array(SIDE * SIDE), SIDE, [0, 1]);
      showBars();
      if (open) showMaps(seen || []);
      part('covered').hidden = true;
      figure.dataset.ms = performance.now() - start;
      part('time').textContent = levels ? `computed here in ${time.toFixed(1)} ms` : '';
      say(levels ? inWords(known.classes, answer) : 'Nothing is drawn yet.');
    }

    function showBars() {
      const best = answer ? answer.indexOf(Math.max(...answer)) : -1;
      part('bars').replaceChildren(...known.classes.map((name, i) => {
        const row = element('li'), bar = element('i');
        const says = answer ? percent(answer[i]) : '–';
        bar.style.setProperty('--p', answer ? answer[i] : 0);
        bar.ariaHidden = true;
        row.classList.toggle('best', i === best);
        row.append(element('span', name), bar, element('span', says));
        return row;
      }));
    }

    // What comes out of each layer that still has maps; if an activation follows, what
    // comes out of that.
    function showMaps(seen) {
      const layers = seen.filter(({ shape: [, h] }, i) =>
        h > 1 && !['relu', 'gelu'].includes(seen[i + 1] && seen[i + 1].op));
      const empty = element('p', 'Draw something to see the maps.');
      part('maps').replaceChildren(...layers.map((layer, i) => {
        const box = element('figure'), sheet = element('canvas');
        const [n, h, w] = layer.shape, maps = n > 1 ? 'maps' : 'map';
        const words = element('figcaption');
        words.textContent = `Layer ${i + 1}: ${n} ${maps} of ${h}×${w}`;
        sheet.setAttribute('role', 'img');
        sheet.ariaLabel = `${words.textContent}, the brighter the larger`;
        paintMaps(sheet, layer);
        box.append(words, sheet);
        return box;
      }), ...(layers.length ? [] : [empty]));
    }

    function cover() {
      if (!levels) { say('Draw something first.'); return; }
      const mine = ++job, top = answer.indexOf(Math.max(...answer)), old = levels;
      const name = known.classes[top];
      const ask = picture => softmax(known.logits(picture));
      part('covered').hidden = false;
      part('falls').hidden = true;
      part('about').textContent = 'Covering …';
      coverAll(old, ask, top, () => mine === job,
        share => { part('about').textContent = `Covering … ${percent(share)}`; },
        (falls, places) => {
          paintFalls(part('falls'), old, falls, places);
          part('falls').hidden = false;
          const least = falls.indexOf(Math.max(...falls)), fall = falls[least];
          const now = percent(answer[top]), then = percent(answer[top] - fall);
          part('about').textContent = fall < 0.005
            ? `No square takes anything from ${name} (${now}).`
            : `Orange: without it, ${name} loses. A square at the `
              + `${whereIs(least, places)} costs most: from ${now} to ${then}.`;
        });
    }

    async function take(file) { // a picture, or another network
      try {
        if (/\.json$/i.test(file.name) || file.type === 'application/json') {
          need(file.size < 4e6, 'it is larger than 4 MB');
          let read;
          try { read = JSON.parse(await file.text()); }
          catch { throw new Error('it is not JSON'); }
          known = readNetwork(read);
          part('named').textContent = `The network is now that of ${file.name}.`;
        } else {
          let ink;
          try { ink = await inkOf(file, pad.side); }
          catch { throw new Error('this browser cannot read it as a picture'); }
          pad.put(ink);
          part('fit').checked = true;
          part('named').textContent = `The picture is that of ${file.name}.`;
        }
        request();
      } catch (error) {
        part('named').textContent =
          `${file.name} cannot be used: ${error.message}. Choose a picture, or a .json `
          + 'file that export_network has written.';
      }
    }

    function putPicture(bytes) { // each point becomes a square of the pad
      const times = pad.side / SIDE;
      pad.put(Float32Array.from({ length: pad.side ** 2 }, (_, i) => {
        const x = i % pad.side, y = (i - x) / pad.side;
        return bytes[Math.floor(y / times) * SIDE + Math.floor(x / times)] / 255;
      }));
      part('fit').checked = false;
      request();
    }

    function fill() {
      const now = pad.levels(), isInside = inside(now, pad.side);
      pad.put(now.map((v, i) => v < 0.6 && isInside(i) ? 0.6 : v));
      request();
    }

    const stored = new Uint8Array(bytesOf(pictures));
    const one = i => stored.subarray(i * SIDE ** 2, (i + 1) * SIDE ** 2);
    figure.querySelectorAll('[data-part=pictures] canvas').forEach((small, i) =>
      paintLevels(small, Float32Array.from(one(i)), SIDE, [0, 255]));
    const pick = () => {
      const radio = part('pictures').querySelector(':checked');
      if (radio) putPicture(one(+radio.value));
    };
    part('pictures').addEventListener('change', pick);
    const act = (name, fn) => part(name).addEventListener('click', fn);
    act('clear', () => {
      pad.clear();
      part('pictures').querySelectorAll('input').forEach(r => { r.checked = false; });
      part('fit').checked = true;
      request();
    });
    act('fill', fill);
    act('cover', cover);
    act('show', () => {
      const open = part('maps').hidden;
      part('maps').hidden = !open;
      part('show').setAttribute('aria-expanded', open);
      request();
    });
    part('fit').addEventListener('change', request);
    part('file').addEventListener('change', event => {
      const [file] = event.target.files;
      if (file) take(file);
    });
    figure.addEventListener('dragover', event => event.preventDefault());
    figure.addEventListener('drop', event => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (file) take(file);
    });

    figure.querySelectorAll('[data-live]').forEach(e => { e.hidden = false; });
    part('still').hidden = true;
    pick();
    request();
  });
}
