// A button "shapes" for each traced block of code, and one switch for the page. Notes
// wait in folded lists; each is handed to its line as an attribute, which the style
// sheet shows: the text of the code stays clean.
function xray() {
  const all = document.querySelector('.nn-x-all');
  const box = all.querySelector('input'), says = all.querySelector('span');
  const blocks = [];

  function prepare(list) {
    const block = list.previousElementSibling?.querySelector('div.sourceCode');
    const code = block?.querySelector('pre > code');
    if (!code) return;
    const lines = code.querySelectorAll(':scope > span');
    for (const note of list.querySelectorAll('i')) {
      const [number, ...said] = note.dataset.x.split(' · ');
      const line = lines[number - 1];
      if (line) line.dataset.x = said.join(' · ');
    }
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', className: 'nn-x-b' });
    button.textContent = 'shapes';
    button.title = 'Show what each line makes';
    block.classList.add('nn-x-block');
    block.append(button);
    list.hidden = true;
    const set = on => {
      code.classList.toggle('nn-x-on', on);
      button.setAttribute('aria-pressed', on);
    };
    const isOn = () => code.classList.contains('nn-x-on');
    button.addEventListener('click', () => { set(!isOn()); tell(); });
    set(false);
    blocks.push({ set, isOn });
  }

  function tell() {
    const on = blocks.filter(block => block.isOn()).length;
    box.checked = on === blocks.length;
    box.indeterminate = on > 0 && on < blocks.length;
    const words = 'Shapes are shown in ' + on + ' of ' + blocks.length + ' blocks.';
    says.textContent = on ? words : '';
  }

  document.querySelectorAll('details.nn-x').forEach(prepare);
  all.style.display = 'block';
  box.addEventListener('change', () => {
    for (const block of blocks) block.set(box.checked);
    tell();
  });
}
