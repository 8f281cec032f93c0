// What an eraser would change: cover a square of the picture at one place after the
// other and ask the network each time.

const SQUARE = 7, STEP = 2;

// `done(falls, places)` gets by how much the probability of class `top` falls at each
// of places × places. It works in slices, so that the page stays alive; it stops when
// `alive()` is false.
function coverAll(levels, ask, top, alive, progress, done) {
  const places = SIDE / STEP, before = ask(levels)[top];
  const falls = new Float32Array(places * places);
  let next = 0;
  function slice() {
    if (!alive()) return;
    const end = performance.now() + 12;
    while (next < falls.length && performance.now() < end) {
      const x = STEP * (next % places) - 3, y = STEP * Math.floor(next / places) - 3;
      const covered = levels.slice();
      for (let j = Math.max(y, 0); j < Math.min(y + SQUARE, SIDE); j++)
        covered.fill(0, j * SIDE + Math.max(x, 0),
          j * SIDE + Math.min(x + SQUARE, SIDE));
      falls[next++] = before - ask(covered)[top];
    }
    if (next === falls.length) { done(falls, places); return; }
    progress(next / falls.length);
    requestAnimationFrame(slice);
  }
  slice();
}

// The picture in grey, with orange where covering costs probability and blue where it
// adds some.
function paintFalls(canvas, levels, falls, places) {
  const pen = canvas.getContext('2d'), image = pen.createImageData(SIDE, SIDE);
  const most = falls.reduce((a, v) => Math.max(a, Math.abs(v)), 0.02);
  for (let i = 0; i < SIDE * SIDE; i++) {
    const x = i % SIDE, y = (i - x) / SIDE;
    const fall = falls[(y >> 1) * places + (x >> 1)] / most;
    const to = fall > 0 ? [230, 120, 0] : [60, 150, 255], share = Math.abs(fall) * 0.85;
    const grey = 40 + 180 * levels[i];
    to.forEach((v, c) => { image.data[4 * i + c] = grey + share * (v - grey); });
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

// “at the top left” and the like, of a place in a square of `places`
function whereIs(at, places) {
  const third = v => Math.min(2, Math.floor(3 * v / places));
  const row = ['top', 'middle', 'bottom'][third(Math.floor(at / places))];
  const column = ['left', 'middle', 'right'][third(at % places)];
  if (row === column) return 'in the middle';
  return 'at the ' + [row, column].filter(word => word !== 'middle').join(' ');
}

// Cover the picture and show what falls; `name` and `share`: of the likeliest class.
function showFalls(part, levels, ask, { top, name, share }, alive) {
  const about = part('about');
  part('covered').hidden = false;
  part('falls').hidden = true;
  about.textContent = 'Covering …';
  const progress = p => { about.textContent = 'Covering … ' + percent(p); };
  coverAll(levels, ask, top, alive, progress, (falls, places) => {
    paintFalls(part('falls'), levels, falls, places);
    part('falls').hidden = false;
    const most = falls.indexOf(Math.max(...falls)), fall = falls[most];
    const none = 'No square takes anything from ' + name + ' (' + percent(share) + ').';
    const some = ['Orange: without it,', name, 'loses. A square',
      whereIs(most, places), 'costs most: from', percent(share), 'to',
      percent(share - fall) + '.'].join(' ');
    about.textContent = fall < 0.005 ? none : some;
  });
}
