// The view of `draw_view`: a pad, what the network sees of it, and what it answers.

// What a file holds: { network } or { ink }. It throws an error that ends the sentence
// “This file cannot be used: …”.
async function contentOf(file, side) {
  if (/\.bin$/i.test(file.name)) {
    need(file.size < 4e6, 'it is larger than 4 MB');
    return { network: readNetwork(await file.arrayBuffer()) };
  }
  try { return { ink: await inkOf(file, side) }; }
  catch { throw new Refused('this browser cannot read it as a picture'); }
}

// Why a file cannot be used, and what can be.
function refusal(file, error) {
  return file.name + ' cannot be used: ' + error.message + '. Choose a picture, or a '
    + '.bin file that export_network has written.';
}

// Levels of a pad from 28×28 bytes: each point becomes a square.
function enlarged(bytes, side) {
  const times = side / SIDE;
  return Float32Array.from({ length: side ** 2 }, (_, i) => {
    const x = i % side, y = (i - x) / side;
    return bytes[Math.floor(y / times) * SIDE + Math.floor(x / times)] / 255;
  });
}

// The same levels, with grey inside an outline.
function filled(now, side) {
  const isInside = inside(now, side);
  return now.map((v, i) => v < 0.6 && isInside(i) ? 0.6 : v);
}

// Call `speak` with the last words when the hand rests.
function afterRest(speak) {
  let words = '', wait = 0;
  const now = () => speak(words);
  return text => {
    words = text;
    clearTimeout(wait);
    wait = setTimeout(now, 600);
  };
}

// The line below the buttons: what is in use, or why a file cannot be used.
function fileLine(part) {
  let network = '';
  const show = text => {
    part('named').textContent = [network, text].filter(Boolean).join(' ');
  };
  return {
    network(name) { network = 'The network is now that of ' + name + '.'; show(''); },
    picture(name) { show('The picture is that of ' + name + '.'); },
    refused(file, error) { show(refusal(file, error)); },
    forget() { show(''); },
  };
}

// None of the stored pictures is picked any more.
function unpick(part) {
  const picked = part('pictures').querySelector(':checked');
  if (picked) picked.checked = false;
}

// Bring a view to life: `pictures` are the bytes of those that can be picked.
function drawing({ id, network, pictures }) {
  const stored = new Uint8Array(bytesOf(pictures));
  const picture = i => stored.subarray(i * SIDE ** 2, (i + 1) * SIDE ** 2);
  once(id, figure => {
    const part = name => figure.querySelector('[data-part=' + name + ']');
    const chosen = name => part(name).querySelector(':checked').value;
    const tool = () => ({ size: +chosen('size'), erase: chosen('tool') === 'erase' });
    const say = afterRest(words => { part('says').textContent = words; });
    const pad = drawingPad(part('pad'), tool, request), line = fileLine(part);
    let known = readNetwork(bytesOf(network)), levels, answer, wanted = false, job = 0;

    // At most one answer for each picture that the screen shows. A covering that is
    // under way has another picture: it ends.
    function request() {
      job++;
      if (!wanted) requestAnimationFrame(update);
      wanted = true;
    }

    function update() {
      wanted = false;
      const start = performance.now(), view = part('fit').checked ? fitted : asItIs;
      const open = !part('maps').hidden, seen = [];
      levels = view(pad.levels(), pad.side);
      answer = levels && softmax(known.logits(levels, open && seen));
      const time = (performance.now() - start).toFixed(1);
      paintLevels(part('seen'), levels || new Float32Array(SIDE ** 2), SIDE, [0, 1]);
      showBars(part('bars'), known.classes, answer);
      if (open) showMaps(part('maps'), seen);
      part('covered').hidden = true;
      part('time').textContent = levels ? 'computed here in ' + time + ' ms' : '';
      say(levels ? inWords(known.classes, answer) : 'Nothing is drawn yet.');
    }

    function put(ink, fit) {
      pad.put(ink);
      part('fit').checked = fit;
      request();
    }

    // Another picture, which is none of the stored ones.
    function replace(ink) {
      unpick(part);
      put(ink, true);
    }

    const take = file => contentOf(file, pad.side).then(({ ink, network: other }) => {
      if (other) known = other;
      else replace(ink);
      line[other ? 'network' : 'picture'](file.name);
      request();
    }).catch(error => line.refused(file, error));

    const acts = {
      clear() {
        line.forget();
        replace(new Float32Array(pad.side ** 2));
      },
      fill() { put(filled(pad.levels(), pad.side), part('fit').checked); },
      show() {
        part('maps').hidden = !part('maps').hidden;
        part('show').setAttribute('aria-expanded', !part('maps').hidden);
        request();
      },
      cover() {
        if (!levels) { say('Draw something first.'); return; }
        const mine = ++job, share = Math.max(...answer), top = answer.indexOf(share);
        showFalls(part, levels, other => softmax(known.logits(other)),
          { top, share, name: known.classes[top] }, () => mine === job);
      },
    };
    const pick = i => { line.forget(); put(enlarged(picture(i), pad.side), false); };
    listen(figure, part, acts, request, take, pick);
    followPointer(part('pad'), pad);
    followKeys(part('pad'), part('cursor'), pad, say);
    wake(figure, part, picture);
    request();
  });
}

// Buttons, boxes, files and stored pictures: what they call.
function listen(figure, part, acts, request, take, pick) {
  for (const [name, act] of Object.entries(acts))
    part(name).addEventListener('click', act);
  part('fit').addEventListener('change', request);
  part('pictures').addEventListener('change', event => pick(+event.target.value));
  const given = files => { if (files.length) take(files[0]); };
  part('file').addEventListener('change', event => given(event.target.files));
  // The same file once more is a change as well.
  part('file').addEventListener('click', event => { event.target.value = ''; });
  figure.addEventListener('dragover', event => event.preventDefault());
  figure.addEventListener('drop', event => {
    event.preventDefault();
    given(event.dataTransfer.files);
  });
}

// The still picture makes place for the pad and the tools; the first picture is picked.
function wake(figure, part, picture) {
  const small = [...part('pictures').querySelectorAll('canvas')];
  small.forEach((canvas, i) =>
    paintLevels(canvas, Float32Array.from(picture(i)), SIDE, [0, 255]));
  figure.querySelectorAll('[data-live]').forEach(e => { e.hidden = false; });
  part('still').hidden = true;
  const first = part('pictures').querySelector(':checked');
  if (first) first.dispatchEvent(new Event('change', { bubbles: true }));
}
