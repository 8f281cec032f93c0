// From a drawing, or from a file, to the 28×28 grey levels that a network sees: 0 is
// the background, 1 is white.

const SIDE = 28, FAINT = 0.1;

// Grey levels of a canvas, from 0 to 1.
function levelsOf(canvas) {
  const { width, height } = canvas;
  const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
  const levels = new Float32Array(width * height);
  for (let i = 0; i < levels.length; i++) levels[i] = data[4 * i] / 255;
  return levels;
}

// First and last row and column with ink; null: there is no ink.
function boxOf(levels, wide) {
  const box = { x0: wide, x1: -1, y0: Infinity, y1: -1 };
  for (let i = 0; i < levels.length; i++) {
    if (levels[i] <= FAINT) continue;
    const x = i % wide, y = (i - x) / wide;
    if (x < box.x0) box.x0 = x;
    if (x > box.x1) box.x1 = x;
    if (y < box.y0) box.y0 = y;
    box.y1 = y;
  }
  return box.x1 < 0 ? null : box;
}

// Cells of `size` pixels, the first from `from` on: which pixels are in each, and with
// what share: [[pixel, share], …].
function cells(from, size, many, n) {
  return Array.from({ length: many }, (_, i) => {
    const start = Math.max(from + i * size, 0);
    const end = Math.min(from + (i + 1) * size, n);
    const parts = [];
    for (let at = Math.floor(start); at < end; at++)
      parts.push([at, (Math.min(at + 1, end) - Math.max(at, start)) / size]);
    return parts;
  });
}

// A part of the levels as 28×28: each point is the mean of what it covers.
function shrunk(levels, wide, left, top, size) {
  const out = new Float32Array(SIDE * SIDE);
  const columns = cells(left, size, SIDE, wide);
  const rows = cells(top, size, SIDE, levels.length / wide);
  for (let j = 0; j < SIDE; j++)
    for (let i = 0; i < SIDE; i++) {
      let sum = 0;
      for (const [y, high] of rows[j])
        for (const [x, share] of columns[i]) sum += levels[y * wide + x] * high * share;
      out[j * SIDE + i] = sum;
    }
  return out;
}

// As Fashion-MNIST was made: cut at the ink, make the longer side 28 points, centre it.
// A dot is enlarged four times at most. null: there is no ink.
function fitted(levels, wide) {
  const box = boxOf(levels, wide);
  if (!box) return null;
  const high = box.y1 - box.y0 + 1, across = box.x1 - box.x0 + 1;
  const size = Math.max(high, across, wide / 4) / SIDE;
  return shrunk(levels, wide, (box.x0 + box.x1 + 1 - size * SIDE) / 2,
    (box.y0 + box.y1 + 1 - size * SIDE) / 2, size);
}

// The levels of the whole canvas, neither cut nor moved; null: there is no ink.
const asItIs = (levels, wide) =>
  boxOf(levels, wide) && shrunk(levels, wide, 0, 0, wide / SIDE);

// What no path around the lines reaches from the rim: true where it is inside.
function inside(levels, wide) {
  const high = levels.length / wide, open = new Uint8Array(levels.length), todo = [];
  const visit = at => {
    if (!open[at] && levels[at] < 0.3) { open[at] = 1; todo.push(at); }
  };
  for (let x = 0; x < wide; x++) { visit(x); visit((high - 1) * wide + x); }
  for (let y = 0; y < high; y++) { visit(y * wide); visit((y + 1) * wide - 1); }
  while (todo.length) {
    const at = todo.pop(), x = at % wide;
    if (x) visit(at - 1);
    if (x < wide - 1) visit(at + 1);
    if (at >= wide) visit(at - wide);
    if (at < levels.length - wide) visit(at + wide);
  }
  return (at => !open[at]);
}

// The levels of a picture from a file: whatever differs from its rim is ink.
async function inkOf(file, side) {
  const picture = await createImageBitmap(file);
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  const scale = side / Math.max(picture.width, picture.height);
  const w = Math.max(1, picture.width * scale), h = Math.max(1, picture.height * scale);
  canvas.width = canvas.height = side;
  pen.drawImage(picture, 0, 0, w, h);
  const { data } = pen.getImageData(0, 0, w, h), across = Math.floor(w);
  const grey = Float32Array.from({ length: data.length / 4 }, (_, i) => {
    // what is transparent shows white paper
    const share = data[4 * i + 3] / 255;
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    return 1 - share + share * (0.299 * r + 0.587 * g + 0.114 * b) / 255;
  });
  const rim = [...grey].filter((_, i) =>
    i < across || i >= grey.length - across || i % across % (across - 1) === 0);
  const paper = rim.sort((a, b) => a - b)[rim.length >> 1];
  const most = grey.reduce((a, v) => Math.max(a, Math.abs(v - paper)), 0.2);
  const levels = new Float32Array(side * side);
  const down = (side - Math.floor(h)) >> 1, right = (side - across) >> 1;
  grey.forEach((v, i) => {
    const at = (down + Math.floor(i / across)) * side + right + i % across;
    const ink = Math.abs(v - paper) / most;
    levels[at] = ink > FAINT ? ink : 0;
  });
  return levels;
}
