// What the programs of this folder have in common.  Each reads commands on stdin, one JSON object a
// line: {"id": 1, "do": NAME, ...}.  Commands run at once; as each ends, one line of JSON with its
// id tells what came of it.

import { createInterface } from "node:readline";

const running = new Map();

// Gives `work` a signal that {"do": "abort", "name": NAME} sets off, as a user's "stop" would.
export async function abortable(name, work) {
  const controller = new AbortController();
  running.set(name, controller);
  return work(controller.signal);
}

function abort({ name }) {
  running.get(name).abort();
  return {};
}

export async function serve(commands, describe) {
  const all = { ...commands, abort };
  for await (const line of createInterface({ input: process.stdin })) {
    const { id, do: name, ...command } = JSON.parse(line);
    Promise.resolve()
      .then(() => all[name](command))
      .catch((error) => ({ error: { is: classes(error), message: error.message, ...describe(error) } }))
      .then((answer) => process.stdout.write(JSON.stringify({ id, ...answer }) + "\n"));
  }
}

// The error's class and those that it inherits from, so that `catch` by class can be judged.
export function classes(error) {
  const names = [];
  let kind = error.constructor;
  for (; kind !== Function.prototype; kind = Object.getPrototypeOf(kind)) names.push(kind.name);
  return names;
}
