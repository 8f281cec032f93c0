// The name under which a browser keeps what you knew.
const CARDS = 'nntrain-cards';

// What is kept: {card: [how often in a row you knew it, day of the last answer]}.
// A browser may refuse to keep anything; then `kept` lasts as long as the page.
const memory = {
  kept: {},
  lasts: true,

  read() {
    if (!this.lasts) return this.kept;
    try {
      const kept = JSON.parse(localStorage.getItem(CARDS));
      this.kept = kept instanceof Object && !Array.isArray(kept) ? kept : {};
    } catch (error) { this.lasts = !(error instanceof DOMException); }
    return this.kept;
  },

  write(kept) {
    this.kept = kept;
    try { localStorage.setItem(CARDS, JSON.stringify(kept)); }
    catch (error) { this.lasts = false; }
  },

  forget() {
    this.kept = {};
    try { localStorage.removeItem(CARDS); }
    catch (error) { this.lasts = false; }
  }
};

// How often in a row you knew a card: 0 if not yet, undefined if it was never asked.
function timesKnown(card, kept) {
  const entry = kept[card.dataset.card];
  return Array.isArray(entry) ? Number(entry[0]) || 0 : undefined;
}

// The lower, the sooner: not yet known, never asked, known. Each time you know a card
// doubles the days until it is due.
function turn(card, kept) {
  const times = timesKnown(card, kept);
  if (times === undefined) return 0;
  return times ? kept[card.dataset.card][1] + 2 ** Math.min(times, 10) : -1;
}

// Note an answer.
function answered(card, knew) {
  const kept = memory.read(), times = timesKnown(card, kept) || 0;
  const today = Math.floor(Date.now() / 864e5);
  kept[card.dataset.card] = [knew ? times + 1 : 0, today];
  memory.write(kept);
}

// Say beside the question, and by its buttons, what you answered last.
function showAnswer(card, kept) {
  const times = timesKnown(card, kept);
  const mark = card.querySelector('.recall-mark');
  mark.textContent = times === undefined ? '' : times ? ' ✓ known' : ' ↻ not yet';
  card.querySelectorAll('button').forEach(button => {
    const knew = button.dataset.knew === '1';
    const pressed = times !== undefined && knew === times > 0;
    button.setAttribute('aria-pressed', String(pressed));
  });
}

// A box shows a few of its cards, those whose turn it is.
function chooseCards(box) {
  const kept = memory.read(), show = Number(box.dataset.show);
  const cards = [...box.querySelectorAll('.recall-card')];
  if (!show) return;
  const order = new Map(cards.map((card, i) => [card, [turn(card, kept), i]]));
  cards.sort((a, b) => {
    const [p, i] = order.get(a), [q, j] = order.get(b);
    return p - q || i - j;
  });
  const end = box.querySelector('.recall-says');
  cards.forEach((card, i) => {
    card.hidden = i >= show;
    // the order of the keyboard is that of the eye
    end.before(card);
  });
}

// The list shows the cards that its filter lets through.
function filterCards(page) {
  const topic = page.querySelector('.recall-topic').value, kept = memory.read();
  const open = page.querySelector('.recall-open').checked;
  let n = 0;
  document.querySelectorAll('.recall[data-topic]').forEach(box => {
    let here = 0;
    box.querySelectorAll('.recall-card').forEach(card => {
      card.hidden = open && timesKnown(card, kept) > 0;
      here += !card.hidden;
    });
    const shown = here > 0 && (!topic || box.dataset.topic === topic);
    (box.closest('section') || box).hidden = !shown;
    n += shown ? here : 0;
  });
  page.querySelector('.recall-n').textContent = n === 1 ? '1 card' : n + ' cards';
}

// Start the cards of a page: those of a box, or of the list of all cards.
function startCards() {
  const says = document.querySelector('.recall-says');
  const page = document.querySelector('.recall-filter');
  const cards = [...document.querySelectorAll('.recall-card')];
  const tell = words => {
    const gone = ' This browser keeps nothing, so it is forgotten with the page.';
    says.textContent = words + (memory.lasts ? '' : gone);
  };
  const refresh = () => cards.forEach(card => showAnswer(card, memory.read()));

  cards.forEach(card => card.querySelectorAll('button').forEach(button => {
    button.addEventListener('click', () => {
      const knew = button.dataset.knew === '1';
      answered(card, knew);
      showAnswer(card, memory.read());
      tell(knew ? 'Noted: known.' : 'Noted: not yet. It comes first next time.');
    });
  }));
  document.querySelector('.recall-forget').addEventListener('click', () => {
    memory.forget();
    refresh();
    if (page) filterCards(page);
    tell('All progress is deleted.');
  });

  // without this script a card is folded text, and nothing is kept
  document.querySelectorAll('.recall-knew, .recall-end, .recall-filter')
    .forEach(part => { part.hidden = false; });
  document.querySelectorAll('.recall').forEach(chooseCards);
  refresh();
  if (page) {
    page.querySelectorAll('select, input')
      .forEach(part => part.addEventListener('change', () => filterCards(page)));
    filterCards(page);
  }
}
