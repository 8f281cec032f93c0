// A canvas to draw on with mouse, pen, finger or keys: white ink on black, as in the
// data set.

// The canvas and its pen. `tool()` says { size, erase }; `changed()` is called after
// each piece of a stroke.
function drawingPad(canvas, tool, changed) {
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const side = canvas.width, at = { x: side / 2, y: side / 2 };
  pen.lineCap = pen.lineJoin = 'round';

  function clear() {
    pen.fillStyle = '#000';
    pen.fillRect(0, 0, side, side);
  }

  // A line from where the pen is to `x, y`; a dot if it is there already.
  function line(x, y) {
    const { size, erase } = tool();
    pen.strokeStyle = erase ? '#000' : '#fff';
    pen.lineWidth = size;
    pen.beginPath();
    pen.moveTo(at.x, at.y);
    pen.lineTo(x, y);
    pen.stroke();
    Object.assign(at, { x, y });
    changed();
  }

  // Grey levels from 0 to 1, one for each pixel.
  function put(levels) {
    const image = pen.createImageData(side, side);
    levels.forEach((level, i) => {
      image.data.fill(Math.round(level * 255), 4 * i, 4 * i + 3);
      image.data[4 * i + 3] = 255;
    });
    pen.putImageData(image, 0, 0);
  }

  clear();
  return { at, side, clear, line, put, levels: () => levelsOf(canvas) };
}

// Let a mouse, a pen or a finger draw.
function followPointer(canvas, pad) {
  let held = null;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * pad.side / box.width,
      (event.clientY - box.top) * pad.side / box.height];
  };
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return;
    held = event.pointerId;
    canvas.setPointerCapture(held);
    [pad.at.x, pad.at.y] = place(event);
    pad.line(pad.at.x, pad.at.y);
  });
  canvas.addEventListener('pointermove', event => {
    if (event.pointerId !== held) return;
    const all = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const one of all.length ? all : [event]) pad.line(...place(one));
  });
  for (const end of ['pointerup', 'pointercancel'])
    canvas.addEventListener(end, () => { held = null; });
}

const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1],
  ArrowDown: [0, 1] };

// Let keys draw: arrows move a cursor, space lowers the pen or lifts it; `say` is told.
function followKeys(canvas, cursor, pad, say) {
  const { at, side } = pad;
  let down = false;
  function show() {
    cursor.style.left = 100 * at.x / side + '%';
    cursor.style.top = 100 * at.y / side + '%';
    cursor.dataset.down = down;
  }
  canvas.addEventListener('keydown', event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const way = WAYS[event.key];
    if (way) {
      const step = event.shiftKey ? 30 : 10;
      const [x, y] = [at.x + way[0] * step, at.y + way[1] * step]
        .map(v => Math.min(Math.max(v, 5), side - 5));
      if (down) pad.line(x, y);
      else Object.assign(at, { x, y });
    } else if (event.key === ' ') {
      down = !down;
      if (down) pad.line(at.x, at.y);
      say(down ? 'The pen is down.' : 'The pen is up.');
    } else return;
    event.preventDefault();
    show();
  });
  canvas.addEventListener('focus', show);
  canvas.addEventListener('blur', () => { down = false; show(); });
}
