// What stands under curve `i` once curve `pick` was picked.
function markOf(i, pick, answer) {
  if (i === answer) return '✓ this one';
  return i === pick ? '✗ your pick' : '';
}

// Let the reader pick a curve; then say what is right and show both curves.
function predict(question) {
  once(question.id, figure => {
    const one = selector => figure.querySelector(selector);
    const all = selector => [...figure.querySelectorAll(selector)];
    const picks = all('input'), button = one('button');
    const says = one('.nnx-v'), answer = one('details');

    function check() {
      const pick = picks.findIndex(input => input.checked);
      if (pick < 0) { says.textContent = 'Pick a curve first.'; return; }
      const right = pick === question.answer;
      const curve = right ? '' : all('.nnx-o .sr')[pick].getAttribute('d');
      all('.nnx-o b').forEach((mark, i) => {
        mark.textContent = markOf(i, pick, question.answer);
      });
      // the picked curve beside the true one, and its line in the legend
      one('.nnx-m').setAttribute('d', curve);
      one('.nnx-k').hidden = right;
      says.textContent = question.says[pick];
      answer.hidden = false;
      answer.open = true;
    }

    // without this script the answer is an ordinary folded text with its reason
    picks.forEach(input => { input.hidden = false; });
    button.hidden = false;
    answer.hidden = true;
    one('.nnx-w').hidden = true;
    button.addEventListener('click', check);
  });
}
