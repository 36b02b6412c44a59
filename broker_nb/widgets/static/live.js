// The page's side of a live view (docs/design.md, "The live view"). The kernel owns every state; this draws it and asks.
// Text of messages reaches the page by textContent only. No build step and no dependencies: what is read here is what runs.

const ROW = 26; // px, also in live.css
const OVERSCAN = 6;
const BEAT_MS = 10_000;
const SILENT_MS = 25_000; // two beats without an answer
const QUEUED_MS = 800; // an answer later than this has waited for a busy kernel
const COOL_MS = 1200; // how long a settled row stays in its place
const MAX_SHOWN = 200_000; // characters of a body
const MAX_COLOURED = 40_000;
const CHUNK = 500;
const DELAYS = [[5, '5 s'], [30, '30 s'], [60, '1 min'], [300, '5 min'], [1800, '30 min'], [3600, '1 h']];

const PATHS = {
  held: 'M4 7V5a4 4 0 0 1 8 0v2h1v7H3V7h1zm2 0h4V5a2 2 0 0 0-4 0v2z',
  seen: 'M8 5a3 3 0 1 1 0 6 3 3 0 0 1 0-6z',
  read: 'M8 3.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9zm0 1.6a2.9 2.9 0 1 0 0 5.8 2.9 2.9 0 0 0 0-5.8z',
  asking: 'M8 2a6 6 0 1 0 6 6h-1.8A4.2 4.2 0 1 1 8 3.8V2z',
  ack: 'M6.4 12.3 2.3 8.2l1.3-1.3 2.8 2.8 6-6 1.3 1.3z',
  nack: 'M6 3v2.6h3.6a4 4 0 0 1 0 8H5v-1.8h4.6a2.2 2.2 0 0 0 0-4.4H6V10L2.4 6.5z',
  delay: 'M8 1.8a6.2 6.2 0 1 1 0 12.4A6.2 6.2 0 0 1 8 1.8zm0 1.7a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM7.2 5h1.5v2.8l2 1.2-.8 1.2-2.7-1.6z',
  reject: 'm4.2 3 3.8 3.8L11.8 3 13 4.2 9.2 8l3.8 3.8-1.2 1.2L8 9.2 4.2 13 3 11.8 6.8 8 3 4.2z',
  release: 'M3 8.8h6.6L7.2 11.2l1.2 1.2L12.9 8 8.4 3.6 7.2 4.8l2.4 2.4H3z',
  commit: 'M7.2 2h1.6v7.2l2.6-2.6 1.1 1.1L8 12.2 3.5 7.7l1.1-1.1 2.6 2.6zM3 13h10v1.6H3z',
  lost: 'M8 1.6 15 14H1zm-.8 4.6v4h1.6v-4zm0 5v1.5h1.6v-1.5z',
  unknown: 'M8 1.8a6.2 6.2 0 1 1 0 12.4A6.2 6.2 0 0 1 8 1.8zM7.2 11v1.5h1.6V11zM5.6 6.3h1.5c0-1.3 1.8-1.2 1.8-.1 0 .9-1.7 1-1.7 3.2h1.6c0-1.6 1.8-1.6 1.8-3.3 0-2.8-5-2.7-5 .2z',
  pause: 'M4 3h3v10H4zm5 0h3v10H9z',
  play: 'M4 2.5v11l9-5.5z',
  close: 'm4.2 3 3.8 3.8L11.8 3 13 4.2 9.2 8l3.8 3.8-1.2 1.2L8 9.2 4.2 13 3 11.8 6.8 8 3 4.2z',
  copy: 'M5 2h8v9h-2v3H3V5h2zm1.5 1.5V5H11v4.5h.5v-6z',
};
const STATES = {
  seen: ['seen', 'seen'], read: ['read', 'read'], held: ['held', 'held'], asking: ['asking', '…'],
  acked: ['ack', 'acked'], nacked: ['nack', 'nacked'], rejected: ['reject', 'rejected'], released: ['release', 'released'],
  committed: ['ack', 'committed'], lost: ['lost', 'lost'], unknown: ['unknown', 'unknown'],
};
const ACTIONS = {
  ack: ['Ack', 'a', 'Done: it does not come again'],
  nack: ['Nack', 'n', 'Give it back as failed: it comes again at once'],
  delay: ['Nack in', 'd', 'Give it back as failed: it comes again after the time beside'],
  reject: ['Reject', 'x', 'Never deliver it again'],
  release: ['Release', 'r', 'Give it back unchanged'],
  commit: ['Commit up to here', 'c', 'Everything in its partition up to and with this row is done'],
};
const ASKING = { ack: 'acking', nack: 'nacking', reject: 'rejecting', release: 'releasing', commit: 'committing' };
const ACTIONABLE = new Set(['held', 'read']);

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function icon(name) {
  const node = make('span', 'bnb-icon');
  node.style.clipPath = `path(evenodd, '${PATHS[name]}')`;
  node.setAttribute('aria-hidden', 'true');
  return node;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const number = new Intl.NumberFormat('en-US');

function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  return s < 86400 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`;
}

function clock(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const minutes = `${Math.floor(s / 60) % 60}`;
  const rest = `${s % 60}`.padStart(2, '0');
  return s < 3600 ? `${minutes}:${rest}` : `${Math.floor(s / 3600)}:${minutes.padStart(2, '0')}:${rest}`;
}

function bytes(n) {
  if (n < 1000) return `${n} B`;
  return n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`;
}

// Characters that draw nothing, or turn the line around, as something that can be seen.
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

// JSON with line breaks and nothing else changed: a number keeps every digit, a repeated name stays repeated.
function indented(text) {
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g) ?? [];
  const out = [];
  let depth = 0;
  const line = () => out.push(['', `\n${'  '.repeat(Math.min(depth, 40))}`]);
  tokens.forEach((token, i) => {
    if (token === '{' || token === '[') {
      out.push(['', token]);
      depth += 1;
      if (tokens[i + 1] !== '}' && tokens[i + 1] !== ']') line();
    } else if (token === '}' || token === ']') {
      depth -= 1;
      if (tokens[i - 1] !== '{' && tokens[i - 1] !== '[') line();
      out.push(['', token]);
    } else if (token === ',') {
      out.push(['', token]);
      line();
    } else if (token === ':') {
      out.push(['', ': ']);
    } else {
      const kind = token[0] !== '"' ? (/^[-\d]/.test(token) ? 'number' : 'word') : tokens[i + 1] === ':' ? 'name' : 'text';
      out.push([kind, token]);
    }
  });
  return out;
}

function hex(data) {
  const lines = [];
  for (let at = 0; at < Math.min(data.length, 4096); at += 16) {
    const part = [...data.subarray(at, at + 16)];
    const digits = part.map((b) => b.toString(16).padStart(2, '0')).join(' ').padEnd(48);
    lines.push(`${at.toString(16).padStart(6, '0')}  ${digits} ${part.map((b) => (b > 31 && b < 127 ? String.fromCharCode(b) : '·')).join('')}`);
  }
  return lines.join('\n');
}

class LiveView {
  constructor(model, host) {
    this.model = model;
    this.id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
    this.rows = new Map(); // row -> record
    this.ring = new Map(); // place -> row
    this.held = [];
    this.lo = 1;
    this.hi = 0; // of the ring as it is drawn: rows settled just now are still in their place above it
    this.selected = new Set();
    this.cursor = 0;
    this.anchor = 0;
    this.epoch = '';
    this.seq = 0;
    this.offset = 0; // the kernel's clock against the page's
    this.req = 0;
    this.asked = new Map(); // request -> {verb, rows, at}
    this.bodies = new Map();
    this.about = { kind: 'tail', actions: [], columns: [], topic: '', subscription: '' };
    this.counters = { seen: 0, held: 0, dropped: 0, rate: 0, next: null };
    this.health = { level: 'wait', text: 'connecting', notes: [], paused: false };
    this.dead = false;
    this.unheard = false;
    this.heard = performance.now();
    this.wanted = 0;
    this.build(host);
    this.listen();
    this.hello();
  }

  // ------------------------------------------------------------ the page
  build(host) {
    const root = (this.root = make('div', 'bnb-live'));
    root.dataset.lmSuppressShortcuts = 'true'; // else the notebook's own keys cut the cell that shows this
    root.setAttribute('role', 'group');
    const head = make('div', 'bnb-head');
    this.dot = make('span', 'bnb-dot');
    this.title = make('span', 'bnb-title');
    this.facts = make('span', 'bnb-facts');
    this.pause = make('button', 'bnb-button bnb-pause');
    this.pause.type = 'button';
    this.pauseWord = make('span');
    this.pauseIcons = [icon('pause'), icon('play')];
    this.pause.append(...this.pauseIcons, this.pauseWord);
    this.toast = make('span', 'bnb-toast');
    this.toast.setAttribute('role', 'status');
    head.append(this.dot, this.title, this.facts, this.toast, this.pause);

    this.bar = make('div', 'bnb-bar');
    this.bar.setAttribute('role', 'toolbar');
    this.note = make('div', 'bnb-note');
    this.note.setAttribute('role', 'alert');
    this.note.hidden = true;
    this.noteText = make('span');
    this.noteButtons = make('span', 'bnb-note-buttons');
    this.note.append(this.noteText, this.noteButtons);

    this.body = make('div', 'bnb-body');
    this.table = make('div', 'bnb-table');
    this.table.setAttribute('role', 'grid');
    this.table.setAttribute('aria-multiselectable', 'true');
    this.labels = make('div', 'bnb-row bnb-labels');
    this.labels.setAttribute('role', 'row');
    this.box = make('div', 'bnb-box');
    this.box.tabIndex = -1;
    this.table.tabIndex = 0;
    this.box.setAttribute('role', 'rowgroup');
    this.space = make('div', 'bnb-space');
    this.empty = make('div', 'bnb-empty');
    this.fresh = make('button', 'bnb-fresh');
    this.fresh.type = 'button';
    this.box.append(this.space, this.empty);
    this.table.append(this.labels, this.box, this.fresh);
    this.pool = [];
    this.details = make('div', 'bnb-details');
    this.details.hidden = true;
    this.details.setAttribute('role', 'region');
    this.details.setAttribute('aria-label', 'The chosen message');
    this.body.append(this.table, this.details);
    this.foot = make('div', 'bnb-foot');
    this.footHealth = make('span', 'bnb-health');
    this.footKeys = make('span', 'bnb-keys');
    this.foot.append(this.footHealth, this.footKeys);
    root.append(head, this.bar, this.note, this.body, this.foot);
    host.append(root);
  }

  listen() {
    this.stops = [];
    const on = (target, name, act, options) => {
      target.addEventListener(name, act, options);
      this.stops.push(() => target.removeEventListener(name, act, options));
    };
    this.onMessage = (message, buffers) => this.receive(message, buffers);
    this.onComm = () => this.beat();
    this.model.on('msg:custom', this.onMessage);
    this.model.on('comm_live_update', this.onComm);
    on(this.root, 'keydown', (event) => this.key(event));
    on(this.box, 'scroll', () => this.later());
    on(this.box, 'mousedown', (event) => this.press(event));
    on(this.pause, 'click', () => this.send({ type: 'pause', on: !this.health.paused }));
    on(this.fresh, 'click', () => {
      this.box.scrollTop = 0;
    });
    on(document, 'visibilitychange', () => {
      if (!document.hidden) this.beat();
    });
    const sizes = new ResizeObserver(() => this.later());
    sizes.observe(this.box);
    this.stops.push(() => sizes.disconnect());
    const timers = [setInterval(() => this.beat(), BEAT_MS), setInterval(() => this.tick(), 1000)];
    this.stops.push(() => timers.forEach(clearInterval));
    this.watchKernel();
  }

  // Where the notebook lets a widget know its kernel, a restart is seen at once; elsewhere at the next message.
  watchKernel() {
    const kernel = this.model.widget_manager?.kernel;
    if (!kernel?.statusChanged || !kernel.connectionStatusChanged) return;
    const status = (_, now) => {
      if (['restarting', 'autorestarting', 'terminating', 'dead'].includes(now)) this.die();
    };
    const connection = (_, now) => {
      this.unheard = now !== 'connected';
      if (!this.unheard) this.hello();
      this.later();
    };
    kernel.statusChanged.connect(status);
    kernel.connectionStatusChanged.connect(connection);
    this.stops.push(() => {
      kernel.statusChanged.disconnect(status);
      kernel.connectionStatusChanged.disconnect(connection);
    });
  }

  dispose() {
    this.model.off('msg:custom', this.onMessage);
    this.model.off('comm_live_update', this.onComm);
    for (const stop of this.stops) stop();
    this.gone = true;
  }

  // ------------------------------------------------------------ protocol
  send(message) {
    if (this.dead) return false;
    try {
      this.model.send(message);
      return true;
    } catch {
      this.die(); // the model outlived its kernel
      return false;
    }
  }

  hello() {
    this.send({ type: 'ready', v: 1, view: this.id });
  }

  beat() {
    this.send({ type: 'beat', view: this.id });
    this.later();
  }

  die() {
    if (this.dead) return;
    this.dead = true;
    this.root.classList.add('bnb-dead');
    const held = this.counters.held ?? 0;
    let text = 'The kernel was restarted: this is what the view had.';
    if (held && this.about.kind === 'queue') {
      const by = this.about.lease === null ? '' : ` by about ${new Date(Date.now() + this.about.lease * 1000).toLocaleTimeString()}`;
      text = `The kernel was restarted: ${number.format(held)} message${held === 1 ? '' : 's'} will be redelivered${by}.`;
    }
    this.say(text, 'warn');
    this.later();
  }

  receive(message, buffers) {
    if (this.gone) return;
    this.heard = performance.now();
    if (message.type === 'bye') {
      this.dead = true;
      this.root.classList.add('bnb-dead');
      this.say(message.text, 'info');
      return;
    }
    const mine = message.type === 'snapshot' && message.view === this.id;
    if (!mine && (message.epoch !== this.epoch || message.seq !== this.seq + 1)) {
      if (message.type === 'snapshot' && !this.epoch) return; // another page's, before ours has come
      this.resync();
      return;
    }
    this.epoch = message.epoch;
    this.seq = message.seq;
    this.offset = message.now - Date.now();
    const anchor = this.hold();
    if (mine) this.reset(message);
    for (const record of message.rows) this.take(record);
    const unknown = [];
    for (const change of message.states) if (!this.change(change)) unknown.push(change[0]);
    this.bounds(message.ring, mine);
    if (unknown.length) this.send({ type: 'want', lo: 1, hi: 0, rows: unknown.slice(0, 200) });
    this.counters = message.counters;
    this.health = message.health;
    for (const reply of message.replies) this.answer(reply);
    if (message.body) this.open(message.body, buffers?.[0]);
    this.arrange();
    this.hold(anchor);
    this.later();
    if (mine) this.send({ type: 'beat', view: this.id }); // so that the kernel answers clicks from beside a busy cell
  }

  resync() {
    if (performance.now() - (this.resynced ?? -1e9) < 1000) return;
    this.resynced = performance.now();
    this.hello();
  }

  reset(message) {
    this.about = message;
    this.asked.clear(); // what they became is in the states
    put(this.toast, '');
    this.rows.clear();
    this.ring.clear();
    this.lo = 1;
    this.hi = message.ring[1];
    this.labelsFor();
    this.barFor();
  }

  take([n, pos, state, why, until, time, place, key, preview, size, count, fields]) {
    this.rows.set(n, { n, pos, state, why, until, time, place, key, preview, size, count, fields });
    if (pos) this.ring.set(pos, n);
  }

  change([n, pos, state, why, until]) {
    const row = this.rows.get(n);
    if (!row) return false;
    if (state === 'asking') for (const asked of this.asked.values()) asked.received ||= asked.rows.includes(n);
    const wasPinned = !row.pos;
    Object.assign(row, { pos, state, why, until });
    if (pos) {
      this.ring.set(pos, n);
      if (wasPinned) row.flash = performance.now();
    }
    return true;
  }

  bounds([lo, hi], now) {
    for (let pos = this.lo; pos < lo; pos += 1) {
      this.rows.delete(this.ring.get(pos));
      this.ring.delete(pos);
    }
    this.lo = Math.max(this.lo, lo);
    if (this.about.kind === 'tail' || now) {
      if (hi > this.hi && this.box.scrollTop > ROW) this.unseen = (this.unseen ?? 0) + hi - this.hi;
      this.hi = Math.max(this.hi, hi);
    } else if (hi > this.hi) {
      setTimeout(() => {
        if (this.gone) return;
        const anchor = this.hold();
        this.hi = Math.max(this.hi, hi);
        this.arrange();
        this.hold(anchor);
        this.later();
      }, COOL_MS);
    }
  }

  answer(reply) {
    const asked = this.asked.get(reply.req);
    if (!asked) return;
    this.asked.delete(reply.req);
    if (reply.question) {
      this.ask(reply.question, asked);
    } else if (!reply.ok) {
      this.say(reply.text, 'error');
    } else if (reply.done) {
      this.say(`${number.format(reply.done)} ${{ ack: 'acked', nack: asked.delay ? `back in ${span(asked.delay)}` : 'given back as failed', reject: 'rejected', release: 'released', commit: 'committed' }[asked.verb]}`, 'ok');
    }
  }

  // ------------------------------------------------------------ what is where
  arrange() {
    this.held = [];
    for (const row of this.rows.values()) if (!row.pos || row.pos > this.hi) this.held.push(row.n);
    this.held.sort((a, b) => a - b);
    for (const n of this.selected) if (!ACTIONABLE.has(this.rows.get(n)?.state)) this.selected.delete(n);
  }

  get length() {
    return this.held.length + Math.max(0, this.hi - this.lo + 1);
  }

  at(index) {
    return index < this.held.length ? this.held[index] : this.ring.get(this.hi - (index - this.held.length));
  }

  index(n) {
    const row = this.rows.get(n);
    if (!row) return -1;
    return row.pos && row.pos <= this.hi ? this.held.length + this.hi - row.pos : this.held.indexOf(n);
  }

  // Without an argument: which row is at the top now. With it: scroll so that it is there again.
  hold(anchor) {
    if (anchor === undefined) {
      const first = Math.floor(this.box.scrollTop / ROW);
      for (let i = first; this.box.scrollTop > 0 && i < first + 30; i += 1) {
        const n = this.at(i);
        if (n !== undefined) return { n, by: this.box.scrollTop - i * ROW };
      }
      return null;
    }
    const i = anchor ? this.index(anchor.n) : -1;
    if (i < 0) return null;
    this.space.style.height = `${this.length * ROW}px`;
    this.box.scrollTop = i * ROW + anchor.by;
    return null;
  }

  // ------------------------------------------------------------ drawing
  later() {
    if (this.queued || this.gone) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      if (!this.gone) this.draw();
    });
  }

  tick() {
    this.later();
    const late = [...this.asked.values()].find((asked) => performance.now() - asked.at > QUEUED_MS);
    if (late && !this.dead) this.say(late.received ? 'waiting for the broker' : 'kernel busy: queued until the cell ends', 'wait');
  }

  labelsFor() {
    const names = ['', 'State', 'Age', 'Key', ...this.about.columns, 'Body', 'Size', '#'];
    const fixed = this.about.columns.map(() => 'minmax(46px, .4fr)').join(' ');
    this.table.style.setProperty('--bnb-columns', `16px 104px 44px minmax(50px, .5fr) ${fixed} minmax(70px, 1fr) 56px 26px`);
    this.labels.replaceChildren(...names.map((name, i) => {
      const cell = make('span', 'bnb-cell', name);
      cell.setAttribute('role', 'columnheader');
      if (i === names.length - 1) cell.title = 'How often it was delivered';
      return cell;
    }));
    if (this.about.actions.length) {
      this.every = make('input');
      this.every.type = 'checkbox';
      this.every.title = 'Select all (Ctrl+A)';
      this.every.setAttribute('aria-label', 'Select all that can be settled');
      this.every.addEventListener('change', () => this.selectAll(this.every.checked));
      this.labels.firstChild.append(this.every);
    }
    for (const line of this.pool) line.remove();
    this.pool = [];
    const { topic, subscription, kind } = this.about;
    this.title.replaceChildren(make('b', '', topic), ...(subscription ? [make('span', 'bnb-slash', '/'), make('span', '', subscription)] : []));
    this.table.setAttribute('aria-label', `Messages of ${topic} ${subscription}`);
    put(this.empty, { tail: 'Following from now: waiting for the next message', queue: 'Waiting for messages', log: 'Waiting for records' }[kind]);
  }

  barFor() {
    const parts = [];
    this.buttons = [];
    this.picked = make('span', 'bnb-picked');
    for (const name of this.about.actions) {
      const [word, key, help] = ACTIONS[name];
      const button = make('button', `bnb-button bnb-do-${name}`);
      button.type = 'button';
      const where = name === 'reject' && this.about.dead ? `: it goes to ${this.about.dead}` : '';
      button.title = `${help}${where} (${key})`;
      button.append(icon(name), make('span', '', word));
      button.addEventListener('click', () => this.act(name));
      this.buttons.push(button);
      if (name === 'delay') {
        this.delay = make('select', 'bnb-delay');
        this.delay.setAttribute('aria-label', 'After how long it comes again');
        for (const [seconds, text] of DELAYS) this.delay.append(new Option(text, seconds, seconds === 30, seconds === 30));
        const group = make('span', 'bnb-group');
        group.append(button, this.delay);
        parts.push(group);
      } else {
        parts.push(button);
      }
    }
    this.bar.replaceChildren(...parts, this.picked);
    this.bar.hidden = !parts.length;
    put(this.footKeys, parts.length ? '↑↓ move · space select · enter details · ' + this.about.actions.map((a) => `${ACTIONS[a][1]} ${ACTIONS[a][0].toLowerCase().split(' ')[0]}${a === 'delay' ? ' later' : ''}`).join(' · ') : '↑↓ move · enter details · p pause');
  }

  draw() {
    this.drawHead();
    const total = this.length;
    this.space.style.height = `${total * ROW}px`;
    this.empty.hidden = total > 0;
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - OVERSCAN);
    const last = Math.min(total, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + OVERSCAN);
    while (this.pool.length < last - first) this.pool.push(this.line());
    const size = this.pool.length;
    const missing = [];
    const drawn = new Set();
    for (let i = first; i < last; i += 1) {
      const line = this.pool[i % size];
      drawn.add(line);
      const n = this.at(i);
      if (n === undefined) missing.push(this.hi - (i - this.held.length));
      this.fill(line, i, n === undefined ? null : this.rows.get(n));
    }
    for (const line of this.pool) if (!drawn.has(line)) line.hidden = true;
    this.table.setAttribute('aria-rowcount', `${total}`);
    if (missing.length && performance.now() - this.wanted > 300) {
      this.wanted = performance.now();
      this.send({ type: 'want', lo: Math.min(...missing), hi: Math.max(...missing) });
      setTimeout(() => this.later(), 400);
    }
    if (this.box.scrollTop <= ROW) this.unseen = 0;
    this.fresh.hidden = !this.unseen;
    if (this.unseen) put(this.fresh, `${number.format(this.unseen)} new ↑`);
  }

  drawHead() {
    const { counters: c, health, about } = this;
    const now = Date.now() + this.offset;
    const silent = performance.now() - this.heard > SILENT_MS;
    let [level, text] = [health.level, health.text];
    if (this.dead) [level, text] = ['dead', 'not live'];
    else if (this.unheard) [level, text] = ['warn', 'reconnecting to the kernel'];
    else if (silent) [level, text] = ['warn', 'no answer from the kernel: busy, or gone'];
    this.dot.dataset.level = level;
    this.dot.title = text || 'live';
    const word = about.kind === 'log' ? 'not committed' : 'held';
    const next = c.next === null || this.dead ? '' : `next goes back in ${clock((c.next - now) / 1000)}`;
    const facts = [
      about.kind === 'tail' ? '' : `${number.format(c.held)} ${word}`,
      next,
      `${number.format(c.seen)} seen`,
      ...['acked', 'nacked', 'rejected', 'released', 'committed', 'lost', 'unknown'].filter((s) => c[s]).map((s) => `${number.format(c[s])} ${STATES[s][1]}`),
      c.dropped ? `${number.format(c.dropped)} older left the view` : '',
      this.dead ? '' : `${c.rate < 10 ? c.rate : Math.round(c.rate)}/s`,
    ].filter(Boolean);
    put(this.facts, facts.join('  ·  '));
    const paused = health.paused;
    this.pauseIcons[0].style.display = paused ? 'none' : '';
    this.pauseIcons[1].style.display = paused ? '' : 'none';
    put(this.pauseWord, paused ? 'Resume' : 'Pause');
    const stop = about.kind === 'tail' ? 'Read no more for now; it goes on from here (p)' : 'Take no more for now; what is held stays held (p)';
    this.pause.title = paused ? 'Go on (p)' : stop;
    this.pause.disabled = this.dead;
    const notes = this.dead ? [] : health.notes;
    put(this.footHealth, [text || (about.kind === 'tail' ? 'following, no effect on the broker' : 'live'), ...notes].join(' · '));
    this.footHealth.dataset.level = level;
    if (!this.buttons) return;
    const targets = this.targets().length;
    for (const button of this.buttons) button.disabled = this.dead || !targets;
    put(this.picked, this.selected.size ? `${number.format(this.selected.size)} selected` : targets ? 'this row' : '');
    if (this.every) {
      const able = this.held.filter((n) => ACTIONABLE.has(this.rows.get(n)?.state)).length;
      this.every.checked = able > 0 && this.selected.size === able;
      this.every.indeterminate = this.selected.size > 0 && this.selected.size < able;
      this.every.disabled = this.dead || !able;
    }
  }

  line() {
    const line = make('div', 'bnb-row');
    line.setAttribute('role', 'row');
    const cells = ['tick', 'state', 'age', 'key', ...this.about.columns.map(() => 'field'), 'preview', 'size', 'count'].map((name) => {
      const cell = make('span', `bnb-cell bnb-${name}`);
      cell.setAttribute('role', 'gridcell');
      return cell;
    });
    const tick = make('input');
    tick.type = 'checkbox';
    tick.tabIndex = -1;
    if (this.about.actions.length) cells[0].append(tick);
    line.append(...cells);
    const quick = make('span', 'bnb-quick');
    for (const name of this.about.actions) {
      if (name === 'delay') continue;
      const button = make('button', `bnb-do-${name}`);
      button.type = 'button';
      button.tabIndex = -1;
      button.title = ACTIONS[name][0];
      button.setAttribute('aria-label', ACTIONS[name][0]);
      button.append(icon(name));
      button.addEventListener('mousedown', (event) => event.stopPropagation());
      button.addEventListener('click', () => this.act(name, [Number(line.dataset.row)]));
      quick.append(button);
    }
    line.append(quick);
    line.parts = { cells, tick, quick };
    this.space.append(line);
    return line;
  }

  fill(line, i, row) {
    line.hidden = false;
    line.style.transform = `translateY(${i * ROW}px)`;
    line.setAttribute('aria-rowindex', `${i + 1}`);
    const { cells, tick, quick } = line.parts;
    if (!row) {
      line.dataset.row = '';
      line.dataset.state = 'missing';
      for (const cell of cells.slice(1)) put(cell, '');
      put(cells.at(-3), '…');
      tick.hidden = quick.hidden = true;
      return;
    }
    const able = ACTIONABLE.has(row.state) && this.about.actions.length > 0 && !this.dead;
    const picked = this.selected.has(row.n);
    const now = Date.now() + this.offset;
    line.dataset.row = `${row.n}`;
    line.id = `bnb-${this.id}-${row.n}`;
    line.setAttribute('aria-selected', `${picked}`);
    line.classList.toggle('bnb-current', row.n === this.cursor);
    line.classList.toggle('bnb-picked-row', picked);
    line.classList.toggle('bnb-edge', i === this.held.length && i > 0);
    line.classList.toggle('bnb-flash', row.flash !== undefined && performance.now() - row.flash < 900);
    tick.hidden = !able;
    tick.checked = picked;
    tick.setAttribute('aria-label', `Select row ${row.n}`);
    quick.hidden = !able;
    const [symbol, word] = STATES[row.state] ?? ['unknown', row.state];
    const shown = row.state === 'asking' ? ASKING[row.why] ?? 'asking' : row.state === 'nacked' && row.why.startsWith('back in') ? row.why : word;
    if (line.dataset.state !== row.state || line.dataset.shown !== shown) {
      line.dataset.state = row.state;
      line.dataset.shown = shown;
      cells[1].replaceChildren(icon(symbol), make('span', '', shown));
    }
    const problem = ACTIONABLE.has(row.state) && row.why;
    line.classList.toggle('bnb-problem', Boolean(problem));
    cells[1].title = row.why || (row.until ? `held; goes back in ${clock((row.until - now) / 1000)}` : word);
    put(cells[2], row.time === null ? '' : span((now - row.time) / 1000));
    cells[2].title = row.time === null ? '' : new Date(row.time).toISOString();
    this.text(cells[3], row.key, 'no key');
    this.about.columns.forEach((_, c) => this.text(cells[4 + c], row.fields[c], '–'));
    this.text(cells.at(-3), problem ? row.why : row.preview === '' ? null : row.preview, row.preview === '' ? 'empty' : 'null');
    put(cells.at(-2), row.size === null ? '' : bytes(row.size));
    put(cells.at(-1), row.count && row.count > 1 ? `×${row.count}` : '');
    const last = this.about.most && row.count >= this.about.most;
    cells.at(-1).classList.toggle('bnb-last', Boolean(last));
    cells.at(-1).title = last ? `delivery ${row.count} of ${this.about.most}: the last` : '';
    line.title = row.place;
  }

  text(cell, value, instead) {
    const none = value === null || value === undefined;
    put(cell, none ? instead : value);
    cell.classList.toggle('bnb-none', none);
  }

  // ------------------------------------------------------------ choosing
  press(event) {
    const line = event.target.closest?.('.bnb-row');
    if (!line?.dataset.row || event.button !== 0) return;
    const n = Number(line.dataset.row);
    const box = event.target.matches('input');
    if (box) event.preventDefault(); // drawn from `selected`, not by itself
    if (event.shiftKey) event.preventDefault(); // would mark text
    if (event.shiftKey && this.anchor) this.range(this.anchor, n);
    else if (box || event.ctrlKey || event.metaKey) this.toggle(n);
    else {
      this.selected.clear();
      this.anchor = n;
    }
    this.point(n);
    this.table.focus({ preventScroll: true });
    if (!box) this.show(n);
  }

  toggle(n, on = !this.selected.has(n)) {
    this.anchor = n;
    if (on && ACTIONABLE.has(this.rows.get(n)?.state)) this.selected.add(n);
    else this.selected.delete(n);
    this.later();
  }

  range(from, to) {
    const [a, b] = [this.index(from), this.index(to)].sort((x, y) => x - y);
    this.selected.clear();
    for (let i = Math.max(0, a); i <= b; i += 1) {
      const n = this.at(i);
      if (ACTIONABLE.has(this.rows.get(n)?.state)) this.selected.add(n);
    }
    this.later();
  }

  selectAll(on) {
    this.selected = new Set(on ? this.held.filter((n) => ACTIONABLE.has(this.rows.get(n)?.state)) : []);
    this.later();
  }

  point(n) {
    this.cursor = n;
    this.table.setAttribute('aria-activedescendant', `bnb-${this.id}-${n}`);
    const top = this.index(n) * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
    this.later();
  }

  move(by, extend) {
    const from = this.index(this.cursor);
    const to = Math.min(this.length - 1, Math.max(0, from < 0 ? 0 : from + by));
    const n = this.at(to);
    if (n === undefined) return;
    if (extend) {
      if (!this.anchor) this.anchor = this.cursor || n;
      this.range(this.anchor, n);
    }
    this.point(n);
    if (!extend) {
      this.anchor = n;
      if (!this.details.hidden) this.show(n);
    }
  }

  key(event) {
    event.stopPropagation(); // the notebook has keys of its own
    if (event.target.matches('select, input, button, .bnb-details *')) {
      if (event.key === 'Escape') this.table.focus();
      if (event.target.matches('select, button, .bnb-details *') || event.key !== ' ') return;
    }
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key in steps) this.move(steps[event.key], event.shiftKey);
    else if ((event.ctrlKey || event.metaKey) && event.key === 'a') this.selectAll(true);
    else if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    else if (event.key === ' ') this.toggle(this.cursor);
    else if (event.key === 'Enter') this.show(this.details.hidden ? this.cursor : 0);
    else if (event.key === 'Escape') {
      this.selected.clear();
      this.show(0);
    } else if (event.key === 'p') this.send({ type: 'pause', on: !this.health.paused });
    else {
      const name = this.about.actions.find((a) => ACTIONS[a][1] === event.key);
      if (!name) return;
      if (!event.repeat) this.act(name); // a key that is held down settles one row, not all of them
    }
    event.preventDefault();
    this.later();
  }

  // ------------------------------------------------------------ settling
  targets() {
    if (this.selected.size) return [...this.selected].sort((a, b) => a - b);
    return ACTIONABLE.has(this.rows.get(this.cursor)?.state) ? [this.cursor] : [];
  }

  act(name, rows = this.targets()) {
    if (this.dead || !rows.length) return;
    const after = this.held.find((n) => n > rows.at(-1) && ACTIONABLE.has(this.rows.get(n)?.state));
    const ask = { verb: name === 'delay' ? 'nack' : name, delay: name === 'delay' ? Number(this.delay.value) : 0, final: false };
    for (let i = 0; i < rows.length; i += CHUNK) this.request({ ...ask, rows: rows.slice(i, i + CHUNK) });
    if (after && rows.includes(this.cursor)) {
      this.point(after);
      if (!this.details.hidden) this.show(after);
    }
  }

  request({ verb, delay, final, rows }) {
    const req = (this.req += 1);
    if (!this.send({ type: 'ask', req: `${this.id}.${req}`, epoch: this.epoch, verb, rows, delay, final })) return;
    this.asked.set(`${this.id}.${req}`, { verb, delay, rows, at: performance.now() });
    for (const n of rows) {
      const row = this.rows.get(n);
      if (row) Object.assign(row, { state: 'asking', why: verb });
      this.selected.delete(n);
    }
    this.later();
  }

  ask(question, asked) {
    const yes = make('button', 'bnb-button', 'Do it all the same');
    const no = make('button', 'bnb-button', 'Keep');
    yes.addEventListener('click', () => {
      this.say('', '');
      this.request({ ...asked, final: true });
    });
    no.addEventListener('click', () => this.say('', ''));
    this.say(question, 'warn', [yes, no]);
    yes.focus();
  }

  // What went well is said in the head and goes by itself; what did not gets a line of its own, and stays.
  say(text, level, buttons = []) {
    clearTimeout(this.quiet);
    const loud = level === 'error' || level === 'warn' || level === 'info';
    put(this.toast, loud ? '' : text);
    this.toast.dataset.level = level;
    if (!loud && text) {
      if (level === 'ok') this.quiet = setTimeout(() => put(this.toast, ''), 4000);
      return;
    }
    put(this.noteText, text);
    this.note.hidden = !text;
    this.note.dataset.level = level;
    if (level === 'error') {
      const shut = make('button', 'bnb-plain');
      shut.type = 'button';
      shut.setAttribute('aria-label', 'Dismiss');
      shut.append(icon('close'));
      shut.addEventListener('click', () => this.say('', ''));
      buttons.push(shut);
    }
    this.noteButtons.replaceChildren(...buttons);
  }

  // ------------------------------------------------------------ one message
  show(n) {
    const row = this.rows.get(n);
    this.details.hidden = !row;
    this.shown = n;
    if (!row) return;
    this.later();
    if (this.bodies.has(n)) this.reveal(this.bodies.get(n));
    else if (!this.send({ type: 'body', req: this.id, row: n })) this.reveal({ row: n, gone: true });
  }

  open(body, buffer) {
    if (body.req !== this.id) return; // another page asked
    const data = buffer ? new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength) : new Uint8Array();
    this.bodies.set(body.row, { ...body, bytes: data });
    let kept = 0;
    for (const [n, each] of [...this.bodies].reverse()) {
      kept += each.bytes.length + 1000;
      if (kept > 8e6 && n !== body.row) this.bodies.delete(n);
    }
    if (this.shown === body.row) this.reveal(this.bodies.get(body.row));
  }

  reveal(body) {
    const row = this.rows.get(body.row);
    const top = make('div', 'bnb-details-top');
    const title = make('span', 'bnb-details-title', row?.place ?? '');
    const shut = make('button', 'bnb-plain');
    shut.title = 'Close (Esc)';
    shut.setAttribute('aria-label', 'Close');
    shut.append(icon('close'));
    shut.addEventListener('click', () => {
      this.show(0);
      this.table.focus();
    });
    if (body.gone) {
      top.append(title, shut);
      this.details.replaceChildren(top, make('p', 'bnb-none', this.dead ? 'its body was not read before the kernel was restarted' : 'it has left the view'));
      return;
    }
    const { raw, text, tokens, what } = this.readable(body);
    const copy = make('button', 'bnb-plain');
    copy.title = 'Copy the body';
    copy.setAttribute('aria-label', 'Copy the body');
    copy.append(icon('copy'));
    copy.addEventListener('click', () => navigator.clipboard.writeText(raw ?? text).then(() => this.say('copied', 'ok'), () => this.say('the browser does not allow copying here', 'error')));
    top.append(title, make('span', 'bnb-details-what', what), copy, shut);
    const list = make('dl', 'bnb-meta');
    const add = (name, value, none) => {
      list.append(make('dt', '', name), make('dd', value === null ? 'bnb-none' : '', value ?? none));
    };
    if (row?.time) add('time', new Date(row.time).toISOString().replace('T', ' '), '');
    add('key', body.key === null ? null : visible(body.key), 'no key');
    for (const [name, value, kind] of body.attributes) add(kind && kind !== 'str' ? `${visible(name)} (${kind})` : visible(name), value === null ? null : visible(value), 'null');
    const block = make('pre', 'bnb-data');
    block.tabIndex = 0;
    if (tokens) block.append(...tokens.map(([kind, token]) => (kind ? make('span', `bnb-j-${kind}`, visible(token)) : document.createTextNode(token))));
    else block.textContent = text;
    if (body.null || !body.size) block.classList.add('bnb-none');
    this.details.replaceChildren(top, list, block);
  }

  readable(body) {
    if (body.null) return { text: 'null', what: 'null body' };
    if (!body.size) return { text: 'empty', what: 'empty body' };
    const size = bytes(body.size);
    let text;
    try {
      text = new TextDecoder('utf-8', { fatal: true }).decode(body.bytes, { stream: body.size > body.bytes.length });
    } catch {
      return { text: hex(body.bytes), what: `${size}, not text` };
    }
    let tokens = null;
    let what = `text, ${size}`;
    if (/^\s*[{[]/.test(text) && text.length <= MAX_SHOWN) {
      try {
        JSON.parse(text);
        tokens = indented(text);
        what = `JSON, ${size}`;
      } catch {
        what = `${size}, begins like JSON and is none`;
      }
    }
    const all = tokens ? tokens.map((t) => t[1]).join('') : text;
    if (all.length > MAX_SHOWN) return { raw: text, text: `${visible(all.slice(0, MAX_SHOWN))}…`, what: `the first ${bytes(MAX_SHOWN)} of ${size}; view.frame() has all` };
    return { raw: text, text: visible(all), tokens: all.length <= MAX_COLOURED ? tokens : null, what };
  }
}

export default {
  render({ model, el }) {
    const view = new LiveView(model, el);
    return () => view.dispose();
  },
};
