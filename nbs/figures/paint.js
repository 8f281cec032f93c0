// What the view shows: grey levels, maps, bars, and words.

const percent = p => Math.round(100 * p) + ' %';

// A new element with a text.
function element(tag, text = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

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

// What comes out of each layer that still has maps; if an activation follows, what
// comes out of that.
function showMaps(box, seen) {
  const layers = seen.filter(({ shape: [, h] }, i) =>
    h > 1 && !['relu', 'gelu'].includes(seen[i + 1] && seen[i + 1].op));
  box.replaceChildren(...layers.map((layer, i) => {
    const sheet = element('canvas'), frame = element('figure'), [n, h, w] = layer.shape;
    const words = ['Layer', i + 1 + ':', n, n > 1 ? 'maps' : 'map', 'of', h + '×' + w]
      .join(' ');
    sheet.setAttribute('role', 'img');
    sheet.setAttribute('aria-label', words + ', the brighter the larger');
    paintMaps(sheet, layer);
    frame.append(element('figcaption', words), sheet);
    return frame;
  }));
  if (!layers.length) box.append(element('p', 'Draw something to see the maps.'));
}

// A bar for the probability of each class; null: there is no answer.
function showBars(box, classes, answer) {
  const best = answer ? answer.indexOf(Math.max(...answer)) : -1;
  box.replaceChildren(...classes.map((name, i) => {
    const row = element('li'), bar = element('i');
    bar.style.setProperty('--p', answer ? answer[i] : 0);
    bar.setAttribute('aria-hidden', 'true');
    row.classList.toggle('best', i === best);
    row.append(element('span', name), bar,
      element('span', answer ? percent(answer[i]) : '–'));
    return row;
  }));
}

// A sentence about the two likeliest classes.
function inWords(classes, answer) {
  const order = classes.map((_, i) => i).sort((a, b) => answer[b] - answer[a]);
  const [first, second] = order.map(i => classes[i] + ', ' + percent(answer[i]));
  return answer[order[1]] >= 0.005 ? first + '; then ' + second + '.' : first + '.';
}
