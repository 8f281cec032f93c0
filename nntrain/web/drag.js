// The first point of the path in a frame, in units of the picture.
function startOf(data, frame) {
  const [left, top, xScale, yScale] = data.box, [series] = data.series;
  return [left + xScale * (inFrame(series.x, frame)[0] - LOW),
    top + yScale * (LOW + SPAN - inFrame(series.y, frame)[0])];
}

// Which frame starts nearest to a point of the picture: the positions `at` of all
// controls, those of the parameters in `data.drag` changed. Only frames that Python
// computed can be asked for.
function nearest(data, at, x, y) {
  let best = at, least = Infinity;
  const look = (to, free) => {
    if (free.length) {
      const i = data.params.findIndex(param => param.name === free[0]);
      data.params[i].texts.forEach((_, v) =>
        look(to.map((w, j) => j === i ? v : w), free.slice(1)));
      return;
    }
    const [a, b] = startOf(data, frameAt(data.params, to)[0]);
    const far = Math.hypot(a - x, b - y);
    if (far < least) { least = far; best = to; }
  };
  look(at, data.drag);
  return best;
}

// Put the ring where the path starts.
function place(data, ring, frame) {
  const [x, y] = startOf(data, frame);
  ring.setAttribute('cx', x);
  ring.setAttribute('cy', y);
}

// Let the pointer take the ring with it; `move` sets the controls.
function drag(data, ring, at, move) {
  let held = false;
  ring.addEventListener('pointerdown', event => {
    held = true;
    ring.setPointerCapture(event.pointerId);
  });
  ring.addEventListener('pointermove', event => {
    if (!held) return;
    const matrix = ring.ownerSVGElement.getScreenCTM().inverse();
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
    move(nearest(data, at(), point.x, point.y));
  });
  for (const end of ['pointerup', 'pointercancel'])
    ring.addEventListener(end, () => { held = false; });
}
