/**
 * A course in QoS: each scene builds a network in namespaces, measures one concept in it, and shows
 * what was measured, in text and pictures. Needs root, iproute2 and, for some scenes, nftables.
 *
 * ```sh
 * deno task lab                              # priority queuing: what EF changes on a busy link
 * deno task lab --scene call --svg call.svg  # a call beside a download, and its picture
 * deno task lab --scene all --html lab.html  # all scenes, on one page
 * deno task lab --list
 * ```
 *
 * @module
 */

import { Exit } from "../../main.ts";
import { drawSvg, drawTopology, escape } from "./plot.ts";
import { missing } from "../support/processes.ts";
import { POLICING, SHAPING } from "./limits.ts";
import { PATH, REWRITE } from "./marks.ts";
import { CALL, PRIORITY, TOS } from "./queuing.ts";
import type { Command, Scene, Shown } from "./scene.ts";
import type { Stage } from "./traffic.ts";

/** All scenes, in the order of the course. */
export const SCENES: readonly Scene[] = [
  PRIORITY,
  CALL,
  SHAPING,
  POLICING,
  TOS,
  REWRITE,
  PATH,
];

const USAGE = `A course in QoS: networks in namespaces, and what marks, queues and limits do

  sudo "$(command -v deno)" task lab [options]

  --scene NAME   one of those below, or all of them: all; priority unless given
  --svg FILE     write the picture of a scene
  --html FILE    write a page with the scenes: it needs no script and no network
  --list         the scenes
  --help         this text

${list()}
Exit codes: 0 done, 2 bad usage, 23 cannot write, 103 root or a program missing.
`;

function list(): string {
  return SCENES.map(({ name, concept }) => wrap(concept, `  ${name.padEnd(11)}`)).join("");
}

/** Breaks a text into lines of 80 columns, with `first` before it and as many spaces below. */
function wrap(text: string, first = ""): string {
  const indent = " ".repeat(first.length);
  let lines = "", line = first;
  // A number stays with its unit.
  for (const word of text.split(/ (?!(?:ms|s|kB)\b)/)) {
    if (line.length + word.length > 80 && line.trim() !== "") {
      lines += `${line.trimEnd()}\n`;
      line = indent;
    }
    line += `${word} `;
  }
  return `${lines}${line.trimEnd()}\n`;
}

/** What ends the lab early: an exit code, and one line for a person or none. */
class End extends Error {
  constructor(readonly code: number, message: string) {
    super(message);
  }
}

// ─── Arguments ───────────────────────────────────────────────────────────────────────────────────

interface Options {
  readonly scenes: readonly Scene[];
  readonly svg: string | null;
  readonly html: string | null;
  readonly print: string | null;
}

function parseArguments(args: readonly string[]): Options {
  const values: Record<string, string | null> = { scene: null, svg: null, html: null };
  const words = [...args];
  for (let word; (word = words.shift()) !== undefined;) {
    if (word === "--help" || word === "-h") return { ...NOTHING, print: USAGE };
    if (word === "--list") return { ...NOTHING, print: list() };
    const [, name, inline] = /^--(scene|svg|html)(?:=(.*))?$/s.exec(word) ?? [];
    if (name === undefined) throw usage(`unknown argument '${word}'`);
    const value = inline ?? words.shift();
    if (value === undefined || value === "") throw usage(`--${name} needs a value`);
    values[name] = value;
  }
  const wanted = values.scene ?? SCENES[0].name;
  const scenes = SCENES.filter(({ name }) => name === wanted || wanted === "all");
  const names = SCENES.map(({ name }) => name).join(", ");
  if (scenes.length === 0) throw usage(`unknown scene '${wanted}': there are ${names}, and all`);
  if (scenes.length > 1 && values.svg !== null) {
    throw usage("--svg takes one scene: use --html for all of them");
  }
  return { scenes, svg: values.svg, html: values.html, print: null };
}

const NOTHING: Options = { scenes: [], svg: null, html: null, print: null };

function usage(message: string): End {
  return new End(Exit.usage, message);
}

// ─── Output ──────────────────────────────────────────────────────────────────────────────────────

function say(text: string): void {
  let bytes = new TextEncoder().encode(text);
  while (bytes.length > 0) bytes = bytes.subarray(Deno.stdout.writeSync(bytes));
}

/** A file that is opened before something is measured, and written after it. */
class Output implements Disposable {
  readonly #file: Deno.FsFile;
  /** Whether the file is new, and nothing is in it yet. */
  #isBlank = true;

  constructor(readonly path: string) {
    try {
      this.#file = Deno.openSync(path, { write: true, createNew: true });
    } catch (error) {
      if (!(error instanceof Deno.errors.AlreadyExists)) throw cannotWrite(path, error);
      this.#isBlank = false;
      try {
        this.#file = Deno.openSync(path, { write: true });
      } catch (error) {
        throw cannotWrite(path, error);
      }
    }
  }

  write(text: string): void {
    let bytes = new TextEncoder().encode(text);
    try {
      if (this.#file.statSync().isFile) this.#file.truncateSync(0);
      while (bytes.length > 0) bytes = bytes.subarray(this.#file.writeSync(bytes));
      this.#isBlank = false;
    } catch (error) {
      throw cannotWrite(this.path, error);
    }
  }

  [Symbol.dispose](): void {
    this.#file.close();
    if (this.#isBlank) Deno.removeSync(this.path);
  }
}

function cannotWrite(path: string, error: unknown): End {
  const reason = (error as Error).message.replace(/ \(os error.*$/, "").toLowerCase();
  return new End(Exit.cannotWrite, `cannot write ${path}: ${reason}`);
}

/** Says what is being measured: on a terminal in one line that counts seconds. */
class Progress implements Disposable {
  readonly #isLive = Deno.stderr.isTerminal();
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(readonly scene: string) {}

  step(text: string, seconds: number): void {
    clearInterval(this.#timer);
    if (!this.#isLive) return warn(`${this.scene}: ${text}\n`);
    const began = performance.now();
    const draw = () => {
      const passed = Math.round((performance.now() - began) / 1000);
      warn(
        `\r\x1b[K${this.scene}: ${text}, ${passed} of about ${Math.round(seconds)} s`.slice(0, 84),
      );
    };
    draw();
    this.#timer = setInterval(draw, 250);
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
    if (this.#isLive) warn("\r\x1b[K");
  }
}

function warn(text: string): void {
  try {
    Deno.stderr.writeSync(new TextEncoder().encode(text));
  } catch { /* nobody is there to read it */ }
}

/** The commands of a scene, ready to be copied, under comments with their hosts. */
function commandsText(commands: readonly Command[]): string {
  return commands.map(([host, line], at) =>
    `${commands[at - 1]?.[0] === host ? "" : `# on ${host}\n`}${line}\n`
  ).join("");
}

function before({ name, concept, topology, commands }: Scene): string {
  const title = `── ${name} ${"─".repeat(76 - name.length)}`;
  return `${title}\n${wrap(concept)}\n${drawTopology(topology)}\n${commandsText(commands)}\n`;
}

function after({ table, sentences }: Shown): string {
  return `${table}\n${sentences.map((sentence) => wrap(sentence)).join("")}\n`;
}

/** A page with scenes and what was measured in them. */
export function page(played: readonly { scene: Scene; shown: Shown }[]): string {
  const sections = played.map(({ scene, shown }) =>
    `<section id="${scene.name}">
<h2>${scene.name}</h2>
<p>${escape(scene.concept)}</p>
<pre>${escape(drawTopology(scene.topology))}</pre>
<pre>${escape(commandsText(scene.commands))}</pre>
${drawSvg(shown.picture)}<pre>${escape(shown.table)}</pre>
<p class="said">${
      escape(shown.sentences.join(" ")).replace(/(\d) (?=(?:ms|s|kB)\b)/g, "$1\u00a0")
    }</p>
</section>
`
  );
  const links = played.map(({ scene: { name } }) => `<a href="#${name}">${name}</a>`).join(" · ");
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>QoS, measured</title>
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem }
  section { border-top: 1px solid #8888; margin-top: 2rem }
  pre { font-size: 13px; line-height: 1.35; overflow-x: auto; padding: .75rem; background: #8882; border-radius: 6px }
  svg { display: block; box-sizing: border-box; width: 100%; height: auto; border: 1px solid #8884; border-radius: 6px }
  .said { font-weight: 600 }
</style>
</head>
<body>
<h1>QoS, measured</h1>
<p>Networks in namespaces on one machine, and what marks, queues and limits do in them.</p>
<p>${links}</p>
${sections.join("")}</body>
</html>
`;
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────

/**
 * A process that removes the namespaces of this one when it is over, even if it was killed. Signals
 * from the terminal do not reach it.
 */
class Guard implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;

  constructor() {
    const script = `trap '' INT TERM HUP
cat
for name in $(ip netns list | grep -o '^dscp-get-${Deno.pid}-[0-9]*'); do
  ip netns pids $name | xargs -r kill -9
  ip netns delete $name
done`;
    const [stdin, stdout, stderr] = ["piped", "null", "null"] as const;
    this.#child = new Deno.Command("sh", { args: ["-c", script], stdin, stdout, stderr }).spawn();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#child.stdin.close();
    await this.#child.status;
  }
}

async function play(options: Options, signal: AbortSignal): Promise<void> {
  using svg = options.svg === null ? null : new Output(options.svg);
  using html = options.html === null ? null : new Output(options.html);
  await using _guard = new Guard();
  const played: { scene: Scene; shown: Shown }[] = [];
  for (const scene of options.scenes) {
    say(before(scene));
    using progress = new Progress(scene.name);
    const stage: Stage = { signal, step: (text, seconds) => progress.step(text, seconds) };
    const shown = await scene.play(stage);
    progress[Symbol.dispose]();
    say(after(shown));
    played.push({ scene, shown });
    // Some of these files are checked in.
    svg?.write(`<!-- deno-fmt-ignore-file -->\n${drawSvg(shown.picture)}`);
  }
  html?.write(page(played));
}

function checkNeeds(scenes: readonly Scene[]): void {
  const absent = missing([...new Set(scenes.flatMap(({ needs }) => needs))]);
  if (absent.length === 0) return;
  const from = "on Debian: apt-get install iproute2 nftables procps util-linux";
  const how = absent.includes("root") ? 'run it with sudo "$(command -v deno)" task lab' : from;
  throw new End(Exit.cannotRun, `needs ${absent.join(", ")}; ${how}`);
}

async function main(args: readonly string[]): Promise<number> {
  const abort = new AbortController();
  for (const [signal, number] of [["SIGHUP", 1], ["SIGINT", 2], ["SIGTERM", 15]] as const) {
    Deno.addSignalListener(signal, () => abort.abort(new End(128 + number, "")));
  }
  try {
    const options = parseArguments(args);
    if (options.print !== null) return say(options.print), Exit.ok;
    checkNeeds(options.scenes);
    await play(options, abort.signal);
    return Exit.ok;
  } catch (error) {
    // What was interrupted fails in many ways.
    const end = abort.signal.aborted ? abort.signal.reason : error;
    if (end instanceof Deno.errors.BrokenPipe) return Exit.cannotWrite;
    if (!(end instanceof End)) throw end;
    if (end.message !== "") warn(`lab: ${end.message}\n`);
    return end.code;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
