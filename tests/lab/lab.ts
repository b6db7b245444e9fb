/**
 * A course in QoS: each scene builds a network in namespaces, measures one concept in it, and shows
 * what was measured, in text and pictures. Needs root, iproute2 and, for some scenes, nftables.
 *
 * ```sh
 * deno task lab                              # priority queuing: what EF changes on a busy link
 * deno task lab --scene call --svg call.svg  # a call beside a download, and its picture
 * deno task lab --scene all --html lab.html  # all scenes, on one page
 * deno task lab --scene call --keep          # leave the network, and print how to use it by hand
 * deno task lab --list
 * ```
 *
 * @module
 */

import { Exit } from "../../main.ts";
import { missing } from "../support/processes.ts";
import { ARRIVAL, DROP } from "./arrival.ts";
import { byHand, DEFAULT_PREFIX } from "./hand.ts";
import { commandsText, page } from "./page.ts";
import { drawSvg, drawTopology } from "./plot.ts";
import { POLICING, SHAPING } from "./limits.ts";
import { PATH, REWRITE } from "./marks.ts";
import { CALL, PRIORITY, TOS } from "./queuing.ts";
import type { Place, Scene, Shown } from "./scene.ts";
import { presentOf } from "./site.ts";
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
  ARRIVAL,
  DROP,
];

const USAGE = `A course in QoS: networks in namespaces, and what marks, queues and limits do

  sudo "$(command -v deno)" task lab [options]
  sudo npx --yes deno task lab [options]         # without a Deno of your own

  --scene NAME   one of those below, or all of them: all; priority unless given
  --svg FILE     write the picture of a scene
  --html FILE    write a page with the scenes: it needs no script and no network
  --keep         leave the network of a scene, and print how to use it by hand
  --again        measure in the network that --keep has left, or you have built
  --remove       remove it, and end what runs in it
  --name NAME    its namespaces are NAME-client and so on; ${DEFAULT_PREFIX} unless given
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
  /** Where a network is to stand, or stands; `null` for one that is gone at the end. */
  readonly place: Place | null;
  /** The prefix of the namespaces to remove. */
  readonly remove: string | null;
  readonly print: string | null;
}

const NOTHING: Options = {
  scenes: [],
  svg: null,
  html: null,
  place: null,
  remove: null,
  print: null,
};

function parseArguments(args: readonly string[]): Options {
  const values: Record<string, string> = {}, flags = new Set<string>(), words = [...args];
  for (let word; (word = words.shift()) !== undefined;) {
    if (word === "--help" || word === "-h") return { ...NOTHING, print: USAGE };
    if (word === "--list") return { ...NOTHING, print: list() };
    const [, name, inline] = /^--(scene|svg|html|name)(?:=(.*))?$/s.exec(word) ?? [];
    if (/^--(keep|again|remove)$/.test(word)) flags.add(word);
    else if (name === undefined) throw usage(`unknown argument '${word}'`);
    else {
      values[name] = inline ?? words.shift() ?? "";
      if (values[name] === "") throw usage(`--${name} needs a value`);
    }
  }
  const { scene: wanted = SCENES[0].name, svg = null, html = null, name: prefix } = values;
  if (flags.size > 1) throw usage(`${[...flags].join(" and ")} exclude each other`);
  if (prefix !== undefined && !/^[a-z][\w-]{0,30}$/i.test(prefix)) {
    throw usage("--name takes up to 31 letters, digits, _ and -, a letter first");
  }
  if (prefix !== undefined && flags.size === 0) {
    throw usage("--name goes with --keep, --again or --remove");
  }
  if (flags.has("--remove")) return { ...NOTHING, remove: prefix ?? DEFAULT_PREFIX };
  const scenes = SCENES.filter(({ name }) => name === wanted || wanted === "all");
  const names = SCENES.map(({ name }) => name).join(", ");
  if (scenes.length === 0) throw usage(`unknown scene '${wanted}': there are ${names}, and all`);
  if (scenes.length > 1 && svg !== null) {
    throw usage("--svg takes one scene: use --html for all of them");
  }
  if (scenes.length > 1 && flags.size > 0) throw usage(`${[...flags]} takes one scene`);
  const place = { prefix: prefix ?? DEFAULT_PREFIX, isStanding: flags.has("--again") };
  return { ...NOTHING, scenes, svg, html, place: flags.size > 0 ? place : null };
}

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

function before({ name, concept, topology, commands }: Scene): string {
  const title = `── ${name} ${"─".repeat(76 - name.length)}`;
  return `${title}\n${wrap(concept)}\n${drawTopology(topology)}\n${commandsText(commands)}\n`;
}

function after({ table, sentences }: Shown): string {
  return `${table}\n${sentences.map((sentence) => wrap(sentence)).join("")}\n`;
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────

/**
 * A process that removes the namespaces of this one when it is over, even if it was killed. Signals
 * from the terminal do not reach it.
 */
class Guard implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;

  /** @param names of the namespaces, a regular expression */
  constructor(names: string) {
    const script = `trap '' INT TERM HUP
[ "$(cat)" = keep ] && exit
for name in $(ip netns list | cut -d ' ' -f 1 | grep -Ex '${names}'); do
  ip netns pids $name | xargs -r kill -9
  ip netns delete $name
done`;
    const [stdin, stdout, stderr] = ["piped", "null", "null"] as const;
    this.#child = new Deno.Command("sh", { args: ["-c", script], stdin, stdout, stderr }).spawn();
  }

  /** Leaves the namespaces as they are. */
  async keep(): Promise<void> {
    const writer = this.#child.stdin.getWriter();
    await writer.write(new TextEncoder().encode("keep"));
    writer.releaseLock();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#child.stdin.close();
    await this.#child.status;
  }
}

async function play(options: Options, signal: AbortSignal): Promise<void> {
  const { place } = options;
  using svg = options.svg === null ? null : new Output(options.svg);
  using html = options.html === null ? null : new Output(options.html);
  if (place !== null) await checkPlace(options.scenes[0], place);
  await using guard = place?.isStanding ? null : new Guard(
    place === null
      ? `dscp-get-${Deno.pid}-[0-9]+`
      : namesOf(options.scenes, place.prefix).join("|"),
  );
  const played: { scene: Scene; shown: Shown }[] = [];
  for (const scene of options.scenes) {
    say(before(scene));
    using progress = new Progress(scene.name);
    const stage: Stage = { signal, step: (text, seconds) => progress.step(text, seconds) };
    const { shown, built } = await scene.play(stage, place ?? undefined).catch((error) => {
      if (!place?.isStanding || signal.aborted) throw error;
      const [line] = error.message.split("\n");
      throw usage(`the network that stands is not that of '${scene.name}': ${line}`);
    });
    if (place !== null) await guard?.keep();
    progress[Symbol.dispose]();
    say(after(shown));
    if (place?.isStanding === false) say(`${byHand(scene, built, place.prefix)}\n`);
    played.push({ scene, shown });
    svg?.write(drawSvg(shown.picture));
  }
  html?.write(page(played));
}

function namesOf(scenes: readonly Scene[], prefix: string): string[] {
  return scenes.flatMap(({ wiring: { hosts } }) => hosts.map((host) => `${prefix}-${host}`));
}

/** @throws {End} the network stands and should not, or the other way around, or it is used */
async function checkPlace(scene: Scene, { prefix, isStanding }: Place): Promise<void> {
  const names = namesOf([scene], prefix), present = await presentOf(names);
  if (!isStanding) {
    if (present.length === 0) return;
    const how = "--again measures in it, --remove removes it";
    throw usage(`the namespace ${present[0].name} is there already: ${how}`);
  }
  const absent = names.filter((name) => present.every((one) => one.name !== name));
  if (absent.length > 0) throw usage(`no namespace ${absent[0]}: --keep builds the network`);
  for (const host of present) {
    if ((await host.pids()).length === 0) continue;
    const how = `ip netns pids ${host.name} | xargs kill`;
    throw usage(`programs run in ${host.name}; to end them: ${how}`);
  }
}

async function remove(prefix: string): Promise<void> {
  const present = await presentOf(namesOf(SCENES, prefix));
  for (const host of present) await host[Symbol.asyncDispose]();
  const names = present.map(({ name }) => name).join(", ");
  say(names === "" ? `nothing to remove: no namespace ${prefix}-…\n` : `removed ${names}\n`);
}

function checkNeeds(needs: readonly string[]): void {
  const absent = missing([...new Set(needs)]);
  if (absent.length === 0) return;
  const from = "on Debian: apt-get install iproute2 nftables procps util-linux";
  const how = absent.includes("root") ? `run it with sudo ${Deno.execPath()} task lab` : from;
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
    if (options.remove !== null) {
      checkNeeds(["root", "ip"]);
      return await remove(options.remove), Exit.ok;
    }
    checkNeeds(options.scenes.flatMap(({ needs }) => needs));
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
