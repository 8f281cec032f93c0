// One setting as a word: beta_0_9
function word(param, at) {
  return param.name + '_' + param.texts[at].replace(/[^0-9A-Za-z]/g, '_');
}

// All settings as the end of an address, so that a figure can be sent to somebody as it
// is seen: beta = 0.9 and shape = cosine is #id--beta_0_9--shape_cosine
function toHash(id, params, at) {
  return '#' + id + params.map((param, i) => '--' + word(param, at[i])).join('');
}

// The position of each control, -1 where the address does not name one; nothing for the
// address of another figure.
function fromHash(hash, id, params) {
  if (!hash.startsWith('#' + id + '--')) return null;
  const words = hash.split('--');
  return params.map(param =>
    param.texts.findIndex((_, v) => words.includes(word(param, v))));
}
