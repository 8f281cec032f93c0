// Which frame the sliders ask for, and how many of its points. The last parameter runs
// fastest; a step slider chooses no frame.
function frameAt(params, at) {
  let frame = 0, count = Infinity;
  params.forEach((param, i) => {
    if (param.step) count = at[i] + 1;
    else frame = frame * param.texts.length + at[i];
  });
  return [frame, count];
}

// Give life to the sliders of a figure; `data` is what Python packed.
function explore(data) {
  once(data.id, figure => {
    const all = selector => [...figure.querySelectorAll(selector)];
    const sliders = all('input'), outputs = all('output');
    const lines = all('.sr'), tiles = all('.nnx-i');
    const at = () => sliders.map(slider => +slider.value);

    function draw() {
      const now = at(), [frame, count] = frameAt(data.params, now);
      data.params.forEach((param, i) => {
        outputs[i].textContent = param.texts[now[i]];
        sliders[i].setAttribute('aria-valuetext', param.texts[now[i]]);
      });
      data.series.forEach((series, i) => {
        // a window stands still, the strip of tiles moves behind it
        if (series.cells) inFrame(series.cells, frame).forEach((tile, k) =>
          tiles[k].setAttribute('y', -tile * series.pitch));
        else paths(series, frame, count, data.box).forEach((d, k) =>
          lines[2 * i + k].setAttribute('d', d));
      });
    }

    // Set the sliders as the address says; true if it speaks of this figure.
    function read() {
      let hash = '';
      // somebody may have typed the address
      try { hash = decodeURIComponent(location.hash); } catch (e) {}
      const found = fromHash(hash, data.id, data.params);
      if (found) found.forEach((v, i) => { if (v >= 0) sliders[i].value = v; });
      return found;
    }

    function save() {
      // the address of JupyterLab is its own
      if (document.getElementById('jupyter-config-data')) return;
      // a frame without an address of its own refuses
      try {
        history.replaceState(history.state, '', toHash(data.id, data.params, at()));
      } catch (e) {}
    }

    sliders.forEach(s => s.addEventListener('input', () => { draw(); save(); }));
    addEventListener('hashchange', () => { if (read()) draw(); });
    figure.querySelector('.nnx-c').hidden = false;
    if (read()) figure.scrollIntoView();
    draw();
  });
}
