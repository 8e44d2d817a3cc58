// Live figures: <div class="live" data-fn="module:function" data-args="{argument: control}">still</div>.
// Nothing is fetched until a control is touched; then one worker runs the exported Python function and the drawing is replaced.
let worker, calls = 0;
const waiting = new Map();

function ask(fn, args) {
  if (!worker) {
    worker = new Worker(new URL('./live-worker.mjs', import.meta.url), { type: 'module' });
    worker.onmessage = ({ data: { id, error, answer } }) => {
      const { resolve, reject } = waiting.get(id);
      waiting.delete(id);
      error === undefined ? resolve(answer) : reject(new Error(error));
    };
  }
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, fn, args });
  });
}

const element = (tag, fields = {}) => Object.assign(document.createElement(tag), fields);

// One control and its starting value: [lo, hi, start, step?], {options, value} or {text}.
function control(spec, changed) {
  if (Array.isArray(spec)) {
    const [min, max, value, step = 1] = spec;
    const input = element('input', { type: 'range', min, max, step });
    input.value = value;
    const output = element('output', { textContent: value });
    input.oninput = () => { output.textContent = input.value; changed(Number(input.value)); };
    return [value, input, output];
  }
  if ('text' in spec) {
    const input = element('input', { type: 'text', value: spec.text, spellcheck: false });
    input.onchange = () => changed(input.value);
    return [spec.text, input];
  }
  if (spec.options.every(option => typeof option === 'boolean')) {
    const input = element('input', { type: 'checkbox', checked: spec.value });
    input.onchange = () => changed(input.checked);
    return [spec.value, input];
  }
  const input = element('select');
  spec.options.forEach(option => input.append(element('option', { textContent: option, selected: option === spec.value })));
  input.onchange = () => changed(spec.options[input.selectedIndex]);
  return [spec.value, input];
}

function bring(figure) {
  const now = {}, bar = element('div', { className: 'live-bar' }), picture = element('div', { className: 'live-picture' });
  const status = element('span', { className: 'live-status' });
  status.setAttribute('role', 'status');
  picture.append(...figure.childNodes);
  let busy = false, again = false;
  async function draw() {
    if (busy) { again = true; return; }
    busy = true;
    if (!figure.dataset.shown) status.textContent = 'starting Python …';
    try {
      const asked = JSON.stringify(now);
      picture.innerHTML = await ask(figure.dataset.fn, now);
      figure.dataset.shown = asked;
      status.textContent = '';
    } catch (error) { status.textContent = error.message; }
    busy = false;
    if (again) { again = false; draw(); }
  }
  for (const [name, spec] of Object.entries(JSON.parse(figure.dataset.args))) {
    const label = element('label', { textContent: name.replaceAll('_', ' ') + ' ' });
    const [value, ...parts] = control(spec, chosen => { now[name] = chosen; draw(); });
    now[name] = value;
    label.append(...parts);
    bar.append(label);
  }
  bar.append(status);
  figure.append(bar, picture);
}

document.querySelectorAll('.live').forEach(bring);
