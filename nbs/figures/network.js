// A trained network without Python: its file becomes arrays, and operations run it.
// What flows through is { data: Float32Array, shape: [channels, height, width] }.

// The bytes that a text of base64 stands for.
function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

// An error that a reader can understand; all others mean that a file is damaged.
class Refused extends Error {}

// Refuse a file in words unless something is as it must be.
function need(is, says) {
  if (!is) throw new Refused(says);
}

// A file is one line of JSON with bytes behind it. `take(Kind, n)` gives the next `n`
// numbers of these bytes, and `left()` says how many bytes remain.
function opened(buffer) {
  let at = new Uint8Array(buffer).indexOf(10) + 1, line;
  try { line = JSON.parse(new TextDecoder().decode(buffer.slice(0, at))); }
  catch { line = null; }
  const take = (Kind, n) => {
    const from = at, size = n * Kind.BYTES_PER_ELEMENT;
    need(from + size <= buffer.byteLength, 'it is cut short');
    at += size;
    return new Kind(buffer.slice(from, at));
  };
  return { line, take, left: () => buffer.byteLength - at };
}

// Do the numbers make sense only with their bytes turned around?
function isTurned(numbers) {
  const usual = v => v > 1e-9 && v < 1e9, view = new DataView(numbers.buffer);
  const turned = numbers.map((_, i) => view.getFloat32(4 * i));
  return !numbers.every(usual) && turned.every(usual);
}

// A layer with its numbers: first the codes of the weights, whole numbers of 8 bits,
// then for each output channel what a step of one is worth, and the biases.
function made(layer, take) {
  const { op, paths, shape: sizes } = layer;
  need(Object.hasOwn(OPERATIONS, op),
    'it holds the operation “' + op + '”, which this page does not know');
  if (op === 'add')
    return { ...layer, paths: paths.map(path => path.map(one => made(one, take))) };
  if (!sizes) return layer;
  need(sizes.every(n => Number.isInteger(n) && n > 0), 'its shapes are damaged');
  const codes = take(Int8Array, sizes.reduce((a, b) => a * b));
  const scales = take(Float32Array, sizes[0]), bias = take(Float32Array, sizes[0]);
  need(scales.every(s => s > 0 && s < Infinity) && bias.every(Number.isFinite)
    && !isTurned(scales),
    'its numbers are damaged, or have their bytes in another order');
  const each = codes.length / scales.length;
  const weight = Float32Array.from(
    codes, (code, i) => code * scales[Math.floor(i / each)]);
  return { ...layer, weight, bias, sizes };
}

// How many windows of `size` fit; with `ceil`, the last one may stick out.
function windows(n, size, stride, padding, ceil) {
  need([size, stride, padding].every(Number.isInteger) && stride > 0 && padding >= 0
    && padding < size, 'its windows are damaged');
  const rest = (n + 2 * padding - size) / stride;
  let many = (ceil ? Math.ceil(rest) : Math.floor(rest)) + 1;
  if (ceil && (many - 1) * stride >= n + padding) many--;
  return many;
}

// The input with a rim of zeros.
function padded({ data, shape: [n, h, w] }, [down, right]) {
  if (!down && !right) return { data, h, w };
  const high = h + 2 * down, wide = w + 2 * right;
  const out = new Float32Array(n * high * wide);
  for (let c = 0; c < n; c++)
    for (let y = 0; y < h; y++) {
      const row = (c * h + y) * w;
      out.set(data.subarray(row, row + w), (c * high + y + down) * wide + right);
    }
  return { data: out, h: high, w: wide };
}

// Each weight of each window is multiplied with a whole row of points at a time.
function conv({ weight, bias, sizes: [many, n, high, wide], stride, padding }, x) {
  need(x.shape[0] === n, 'a convolution does not fit to the channels before it');
  const [down, right] = stride, [, rows, columns] = x.shape;
  const h = windows(rows, high, down, padding[0]);
  const w = windows(columns, wide, right, padding[1]);
  const from = padded(x, padding);
  const out = new Float32Array(many * h * w);
  const { data } = from;
  let at = 0;
  for (let o = 0; o < many; o++) {
    const first = o * h * w;
    out.fill(bias[o], first, first + h * w);
    for (let i = 0; i < n; i++)
      for (let dy = 0; dy < high; dy++)
        for (let dx = 0; dx < wide; dx++) {
          const times = weight[at++];
          if (!times) continue;
          for (let y = 0; y < h; y++) {
            let source = (i * from.h + y * down + dy) * from.w + dx;
            const row = first + y * w;
            for (let to = row; to < row + w; to++, source += right)
              out[to] += times * data[source];
          }
        }
  }
  return { data: out, shape: [many, h, w] };
}

// Multiply and add.
function linear({ weight, bias, sizes: [many, n] }, x) {
  need(x.data.length === n, 'a linear layer does not fit to the numbers before it');
  const out = new Float32Array(many);
  for (let o = 0; o < many; o++) {
    let sum = bias[o];
    for (let i = 0; i < n; i++) sum += weight[o * n + i] * x.data[i];
    out[o] = sum;
  }
  return { data: out, shape: [many, 1, 1] };
}

// The largest number of each window, or the mean.
function pool({ op, size, stride, padding, ceil, whole }, { data, shape: [n, h, w] }) {
  const high = windows(h, size[0], stride[0], padding[0], ceil);
  const wide = windows(w, size[1], stride[1], padding[1], ceil);
  const out = new Float32Array(n * high * wide), largest = op === 'max_pool';
  for (let c = 0, to = 0; c < n; c++)
    for (let oy = 0; oy < high; oy++)
      for (let ox = 0; ox < wide; ox++, to++) {
        const top = oy * stride[0] - padding[0], left = ox * stride[1] - padding[1];
        const y1 = Math.min(top + size[0], h), x1 = Math.min(left + size[1], w);
        let most = -Infinity, sum = 0, count = 0;
        for (let y = Math.max(top, 0); y < y1; y++)
          for (let x = Math.max(left, 0); x < x1; x++, count++) {
            const value = data[(c * h + y) * w + x];
            sum += value;
            if (value > most) most = value;
          }
        // zeros of the rim count, but not what lies beyond
        if (whole)
          count = (Math.min(top + size[0], h + padding[0]) - top)
            * (Math.min(left + size[1], w + padding[1]) - left);
        out[to] = largest ? most : sum / count;
      }
  return { data: out, shape: [n, high, wide] };
}

// The error function, to 2e-7 [Abramowitz and Stegun 7.1.26].
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

const gelu = {
  none: x => x / 2 * (1 + erf(x / Math.SQRT2)),
  tanh: x => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

const OPERATIONS = {
  conv,
  linear,
  relu: (_, x) => ({ ...x, data: x.data.map(v => v > 0 ? v : 0) }),
  gelu: ({ form }, x) => ({ ...x, data: x.data.map(v => gelu[form](v)) }),
  max_pool: pool,
  avg_pool: pool,
  mean: (_, { shape: [n, h, w], data }) =>
    pool({ size: [h, w], stride: [1, 1], padding: [0, 0] }, { shape: [n, h, w], data }),
  flatten: (_, { data }) => ({ data, shape: [data.length, 1, 1] }),
  add({ paths }, x) {
    const [one, two] = paths.map(path => run(path, x));
    need(one.data.length === two.data.length, 'two paths end in different shapes');
    return { ...one, data: one.data.map((v, i) => v + two.data[i]) };
  },
};

// Each operation in turn; `seen` collects what comes out of each.
function run(layers, x, seen) {
  for (const layer of layers) {
    x = OPERATIONS[layer.op](layer, x);
    if (seen) seen.push({ op: layer.op, ...x });
  }
  return x;
}

// Logits as probabilities.
function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, v => Math.exp(v - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(p => p / sum);
}

// The bytes of a file as a function: grey levels from 0 to 1 -> logits. It throws an
// error that ends the sentence “This file cannot be used: …”.
function readNetwork(buffer) {
  try { return networkOf(buffer); }
  catch (error) {
    if (error instanceof Refused) throw error;
    throw new Refused('its content is damaged');
  }
}

// The same without a guard.
function networkOf(buffer) {
  const { line, take, left } = opened(buffer);
  need(line && line.format === 'nntrain network', 'it is not a network of this book');
  need(line.version === 2,
    'its version is ' + line.version + ', and this page reads 2');
  const { shape, mean, std, classes } = line;
  need(Array.isArray(shape) && shape.join() === '1,28,28',
    'it wants pictures of the shape ' + shape + ', and this page makes 1,28,28');
  need([mean, std].every(Number.isFinite) && std > 0,
    'its mean and its spread are not numbers');
  const layers = line.layers.map(layer => made(layer, take));
  need(!left(), 'it has ' + left() + ' bytes that belong to no layer');
  const logits = (levels, seen) =>
    run(layers, { data: levels.map(v => (v - mean) / std), shape }, seen).data;
  // an error shows here, if there is one
  const out = logits(new Float32Array(28 * 28));
  need(Array.isArray(classes) && out.length === classes.length,
    'it gives ' + out.length + ' numbers for its classes ' + classes);
  need(out.every(Number.isFinite), 'its numbers are not finite');
  return { logits, classes };
}
