// A worker that calls exported functions of the package and answers with what they draw.
import { loadPyodide } from './live/pyodide/pyodide.mjs';

const CALL = `
import html, importlib, json

def call(fn, args):
    module, name = fn.split(':')
    try: drawn = getattr(importlib.import_module(module), name)(**json.loads(args))
    except ValueError as error: return json.dumps({'error': str(error)})
    bundle = drawn._repr_mimebundle_()
    answer = bundle.get('text/html') or bundle.get('image/svg+xml') or '<pre>' + html.escape(bundle['text/plain']) + '</pre>'
    return json.dumps({'answer': answer})
`;

const ready = (async () => {
  const python = await loadPyodide({ indexURL: new URL('./live/pyodide/', import.meta.url).href });
  await python.loadPackage(['kvm_mmu_lit'], { messageCallback: () => {} });
  await python.runPythonAsync("import graphviz_wasm\nawait graphviz_wasm.load()\nimport os\nos.environ['IN_TEST'] = '1'");
  python.runPython(CALL);
  return python.globals.get('call');
})();

onmessage = async ({ data: { id, fn, args } }) => {
  try { postMessage({ id, ...JSON.parse((await ready)(fn, JSON.stringify(args))) }); }
  catch (error) { postMessage({ id, error: String(error).trim().split('\n').pop() }); }
};
