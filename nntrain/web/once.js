// Start each figure with this id once: a page may hold the same output twice, and a
// notebook may run the script of an output again.
function once(id, start) {
  for (const figure of document.querySelectorAll('[id="' + id + '"]')) {
    if (figure.dataset.on) continue;
    figure.dataset.on = 1;
    start(figure);
  }
}
