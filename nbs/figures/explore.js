// Which frame the controls ask for, and how many of its points. The last parameter runs
// fastest; a step slider chooses no frame.
function frameAt(params, at) {
  let frame = 0, count = Infinity;
  params.forEach((param, i) => {
    if (param.step) count = at[i] + 1;
    else frame = frame * param.texts.length + at[i];
  });
  return [frame, count];
}

// Give life to the controls of a figure; `data` is what Python packed.
function explore(data) {
  once(data.id, figure => {
    const all = selector => [...figure.querySelectorAll(selector)];
    const [form] = all('form'), [said] = all('.nnx-b span');
    const [reset, link] = all('.nnx-b button');
    const lines = all('.sr'), tiles = all('.nnx-i'), [ring] = all('.nnx-g');
    // a slider, or the buttons of one choice: both have a value
    const controls = data.params.map(p => form.elements[data.id + '-' + p.name]);
    const at = () => controls.map(control => +control.value);
    const set = to => to.forEach((v, i) => { if (v >= 0) controls[i].value = v; });
    // a figure inside of a notebook has no address of its own
    const alone = top === self && !document.getElementById('jupyter-config-data');

    function draw() {
      const now = at(), [frame, count] = frameAt(data.params, now);
      controls.forEach((control, i) => {
        if (!control.type) return;
        const text = data.params[i].texts[now[i]];
        control.nextSibling.textContent = text;
        control.setAttribute('aria-valuetext', text);
      });
      data.series.forEach((series, i) => {
        // a window stands still, the strip of tiles moves behind it
        if (series.cells) inFrame(series.cells, frame).forEach((tile, k) =>
          tiles[k].setAttribute('y', -tile * series.pitch));
        else paths(series, frame, count, data.box).forEach((d, k) =>
          lines[2 * i + k].setAttribute('d', d));
      });
      if (ring) place(data, ring, frame);
      said.textContent = '';
    }

    // Set the controls as the address says; true if it speaks of this figure.
    function read() {
      let hash = '';
      // somebody may have typed the address
      try { hash = decodeURIComponent(location.hash); } catch (e) {}
      const found = fromHash(hash, data.id, data.params);
      if (found) set(found);
      return found;
    }

    function moved() {
      draw();
      // a page may refuse to change its address
      try {
        if (alone) history.replaceState(
          history.state, '', toHash(data.id, data.params, at()));
      } catch (e) {}
    }

    async function copy() {
      const hash = encodeURI(toHash(data.id, data.params, at()));
      const address = location.href.split('#')[0] + hash;
      try {
        await navigator.clipboard.writeText(address);
        said.textContent = 'copied';
      } catch (e) { said.textContent = address; }
    }

    form.addEventListener('input', moved);
    reset.addEventListener('click', () => { form.reset(); moved(); });
    form.addEventListener('submit', event => event.preventDefault());
    link.addEventListener('click', copy);
    addEventListener('hashchange', () => { if (read()) draw(); });
    link.hidden = !alone;
    form.hidden = false;
    if (ring) drag(data, ring, at, to => { set(to); moved(); });
    if (read()) figure.scrollIntoView();
    draw();
  });
}
