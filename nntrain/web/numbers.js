// Numbers in two letters, as `figure_numbers` writes them in Python: an axis runs from
// LOW to LOW + SPAN, and GAP says "no point here".
const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-';
const LOW = 1023, SPAN = 2047, GAP = 4095;

// 'AABB' -> [0, 65]
function decode(text) {
  const codes = [];
  for (let i = 0; i < text.length; i += 2)
    codes.push(64 * LETTERS.indexOf(text[i]) + LETTERS.indexOf(text[i + 1]));
  return codes;
}

// The numbers of one frame. What is equal in several frames is stored once: then
// `frames.which` says which text belongs to each.
function inFrame(frames, frame) {
  const texts = frames.texts || frames;
  const at = frames.which ? decode(frames.which)[frame] : frame;
  return decode(texts[texts.length > 1 ? at : 0]);
}
