// The numbers of a graph in one frame, as texts in the order of the boxes.
function numbersAt(series, frame) {
  return inFrame(series.x, frame).map(i => series.texts[i]);
}

// The same numbers as a sentence for a screen reader: "w 2, gradient −1; x 3."
function told(series, frame) {
  const now = numbersAt(series, frame);
  return series.says.map((words, i) => words + now[i]).join('') + '.';
}

// Start a graph. `explore` takes care of the controls, and each change of them writes
// the numbers of the new frame into the boxes.
function graph(data) {
  const [series] = data.series;
  const named = [...document.querySelectorAll('[id="' + data.id + '"]')];
  const fresh = named.filter(figure => !figure.dataset.on);
  explore({ ...data, series: [] });
  for (const figure of fresh) {
    const form = figure.querySelector('form');
    const svg = figure.querySelector('.nnx-d>svg');
    const places = figure.querySelectorAll('.nnx-u');
    const [alt] = svg.getAttribute('aria-label').split(' Now: ');
    const write = () => {
      const at = data.params.map(p => +form.elements[data.id + '-' + p.name].value);
      const [frame] = frameAt(data.params, at);
      numbersAt(series, frame).forEach((text, i) => { places[i].textContent = text; });
      svg.setAttribute('aria-label', alt + ' Now: ' + told(series, frame));
    };
    // a click may be a reset
    for (const kind of ['input', 'click']) form.addEventListener(kind, write);
    addEventListener('hashchange', write);
    write();
  }
}
