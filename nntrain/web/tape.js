// A training tape: one slider moves all panels. Python drew the last moment; these
// functions draw any other one in the same way (tape_panels.py, tape_view.py).

// A number in three digits: 0.0123, 2.31, 145, 3.2e-5; a dash where there is none.
function short(v) {
  if (v === null) return '–';
  const size = Math.abs(v);
  if (v && (size < 0.001 || size >= 1e5)) return v.toExponential(1).replace('e+', 'e');
  return size >= 100 ? v.toFixed(0) : v ? v.toPrecision(3) : '0.00';
}

// The last moment of a tape that is not later than a step.
function momentAt(steps, step) {
  let i = 0;
  while (i + 1 < steps.length && steps[i + 1] <= step) i++;
  return i;
}

// The bar of an update ratio, on a logarithmic scale from 10^-6 to 1.
function bar(v) {
  const wide = v > 0 ? Math.round(200 * (Math.log10(v) + 6) / 6) : 0;
  return 'M0 5H' + Math.min(200, Math.max(0, wide));
}

// A histogram whose bins are letters, one level of 0 to 63 each.
function outline(letters, place) {
  let d = 'M' + place.x + ' 300';
  [...letters].forEach((letter, i) => {
    const right = place.x + Math.round(place.wide * (i + 1) / letters.length);
    const high = Math.round(place.high * LETTERS.indexOf(letter) / 63);
    d += 'V' + (300 - high) + 'H' + right;
  });
  return d + 'V300';
}

// The probabilities of one sample at a moment; NaN where there was no number.
function sharesAt(part, moment, sample) {
  const k = part.classes.length, from = 2 * k * (moment * part.n + sample);
  return decode(part.shares.slice(from, from + 2 * k)).map(code =>
    code === GAP ? NaN : code / (GAP - 1));
}

// The place of the largest probability.
function bestOf(shares) { return shares.indexOf(Math.max(...shares)); }

// One bar a class.
function shareBars(shares) {
  return shares.map((s, i) =>
    'M' + (10 * i + 5) + ' 30V' + (30 - Math.round(28 * (s || 0)))).join('');
}

// What the network says of a sample, as words.
function verdict(shares, target, classes) {
  if (shares.some(isNaN)) return '✗ no number';
  const best = bestOf(shares), share = Math.round(100 * shares[best]) + '\u00a0%';
  return best === target ? '✓ right, ' + share
    : '✗ wrong: ' + classes[best] + ', ' + share;
}

// How many samples are right at a moment.
function rightAt(part, moment) {
  return part.targets.filter((target, i) => {
    const shares = sharesAt(part, moment, i);
    return !shares.some(isNaN) && bestOf(shares) === target;
  }).length;
}

// A moment of a tape in words.
function told(tape, moment, step) {
  const said = ['training loss ' + short(tape.loss[moment])];
  const seen = tape.valid.filter(([when]) => when <= step);
  if (seen.length) said.push('validation loss ' + short(seen[seen.length - 1][1]));
  const part = tape.pictures;
  if (part) said.push(rightAt(part, moment) + ' of ' + part.n + ' ' +
    (part.png === null ? 'samples' : 'pictures') + ' right');
  return said.join(', ');
}

// What a panel shows at a moment: the text or path for one element that has a data-key.
const PANELS = {
  bar: (tape, moment, el) => bar(layer(tape.ratios, el).moved[moment]),
  moved: (tape, moment, el) => short(layer(tape.ratios, el).moved[moment]),
  hist: (tape, moment, el, places) => {
    const { bars } = layer(tape.values, el), n = bars.length / tape.steps.length;
    const place = places[el.dataset.tape + ' ' + el.dataset.name];
    return outline(bars.slice(moment * n, moment * n + n), place);
  },
  zeros: (tape, moment, el) => {
    const share = layer(tape.values, el).zeros[moment];
    return share ? Math.round(100 * share) + '\u00a0% zeros' : '';
  },
  filters: (tape, moment, el) => {
    const at = momentAt(tape.filters.moments, moment);
    return String(-el.dataset.pitch * at);
  },
  shares: (tape, moment, el) =>
    shareBars(sharesAt(tape.pictures, moment, +el.dataset.at)),
  says: (tape, moment, el) => {
    const i = +el.dataset.at, part = tape.pictures;
    return verdict(sharesAt(part, moment, i), part.targets[i], part.classes);
  },
};

// The layer that an element belongs to.
function layer(layers, el) { return layers.find(one => one.name === el.dataset.name); }

// Show a moment in an element: a path, the place of a strip, or a text.
function exchange(el, tape, moment, places) {
  const key = el.dataset.key, make = PANELS[key];
  const value = make ? make(tape, moment, el, places) : short(tape[key][moment]);
  const name = { path: 'd', use: 'y' }[el.tagName.toLowerCase()];
  if (name) el.setAttribute(name, value);
  else el.textContent = value;
}

// Run through the moments while the button is pressed, five or so a second.
function player(button, slider, move) {
  let playing = false, shown = 0;
  const stop = () => {
    playing = false;
    button.textContent = 'play';
    button.setAttribute('aria-pressed', 'false');
  };
  const go = now => {
    if (!playing) return;
    if (now - shown > 200) {
      shown = now;
      slider.value = +slider.value + 1;
      move();
      if (slider.value === slider.max) return stop();
    }
    requestAnimationFrame(go);
  };
  button.addEventListener('click', () => {
    if (playing) return stop();
    if (slider.value === slider.max) slider.value = 0;
    playing = true;
    button.textContent = 'stop';
    button.setAttribute('aria-pressed', 'true');
    requestAnimationFrame(go);
  });
}

// Give life to the slider of a view; `data` is what Python packed.
function tape(data) {
  once(data.id, figure => {
    const form = figure.querySelector('form'), slider = form.querySelector('input');
    const output = form.querySelector('output'), button = form.querySelector('button');
    const says = figure.querySelector('.nnt-w');
    const parts = [...figure.querySelectorAll('[data-key]')];
    const marks = figure.querySelectorAll('.now');
    const last = data.at[data.at.length - 1];

    function draw() {
      const step = data.at[slider.value];
      const moments = data.tapes.map(tape => momentAt(tape.steps, step));
      for (const el of parts) {
        const t = +el.dataset.tape;
        exchange(el, data.tapes[t], moments[t], data.places);
      }
      const x = Math.round(10 * (46 + 246 * step / Math.max(1, last))) / 10;
      for (const mark of marks) mark.setAttribute('d', 'M' + x + ' 10V122');
      output.textContent = 'step ' + step + ' of ' + last;
      slider.setAttribute('aria-valuetext', output.textContent);
      says.textContent = data.tapes.map((tape, t) =>
        (data.tapes.length > 1 ? data.names[t] + ': ' : '') +
        told(tape, moments[t], step)).join('; ') + '.';
    }

    slider.addEventListener('input', draw);
    form.addEventListener('submit', event => event.preventDefault());
    if (button) {
      if (matchMedia('(prefers-reduced-motion: reduce)').matches) button.remove();
      else player(button, slider, draw);
    }
    form.hidden = false;
  });
}
