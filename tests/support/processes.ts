/**
 * Declares tests with prerequisites and runs programs: the script under test, other tools, and the
 * script as an unprivileged user.
 *
 * @module
 */

import { within } from "./waiting.ts";

const decoder = new TextDecoder();

/** The path of the script under test. */
export const MAIN = new URL("../../main.ts", import.meta.url).pathname;

// ─── Tests that need more than Deno ──────────────────────────────────────────────────────────────

/**
 * Declares a test that needs `root` or programs, by name. If any are missing, the test is skipped
 * and its name gives the reason; with `CI=true` it fails instead.
 */
export function testWith(needs: readonly string[], name: string, run: () => Promise<void>): void {
  const absent = missing(needs).join(", ");
  const ci = Deno.env.get("CI") === "true";
  if (absent === "") Deno.test(name, run);
  else if (ci) Deno.test(name, () => Promise.reject(new Error(`needs ${absent}`)));
  else Deno.test({ name: `${name} (skipped: needs ${absent})`, ignore: true, fn: run });
}

/** Returns those needs, `root` or names of programs, that are missing. */
export function missing(needs: readonly string[]): string[] {
  return needs.filter((need) => !has(need));
}

function has(need: string): boolean {
  if (need === "root") return Deno.uid() === 0;
  return searchPath().some((folder) => {
    try {
      return Deno.statSync(`${folder}/${need}`).isFile;
    } catch {
      return false;
    }
  });
}

/** The folders in which programs are searched, by this process and by its children. */
function searchPath(): string[] {
  // Debian keeps system programs in sbin, which is not in every user's PATH.
  const given = Deno.env.get("PATH") ?? "";
  const path = given.endsWith(SBIN) ? given : `${given}${SBIN}`;
  if (path !== given) Deno.env.set("PATH", path);
  return path.split(":");
}

const SBIN = ":/usr/sbin:/sbin";

// ─── Running programs ────────────────────────────────────────────────────────────────────────────

/** The result of a process. */
export interface Outcome {
  code: number;
  signal: Deno.Signal | null;
  stdout: string;
  stderr: string;
  /** Standard output, not decoded. */
  bytes: Uint8Array<ArrayBuffer>;
}

/** Options of a run of the script. */
export interface RunOptions {
  /** Words before the program, such as `ip netns exec NAME`. */
  under?: readonly string[];
  /** Deno's own flags, in place of the two permissions. */
  flags?: readonly string[];
  /** Variables added to the environment of this process. */
  env?: Record<string, string>;
}

const PERMISSIONS = ["--allow-net", "--allow-ffi"];

/** Returns the command line that runs the script. */
export function command(args: readonly string[], options: RunOptions = {}): string[] {
  const { under = [], flags = PERMISSIONS } = options;
  return [...under, Deno.execPath(), "run", "--no-prompt", ...flags, MAIN, ...args];
}

/** Runs the script to its end. */
export async function dscpGet(
  args: readonly string[],
  options: RunOptions = {},
): Promise<Outcome> {
  return await execute(command(args, options), options.env);
}

/** Returns the options that the script's help lists: `--name`, and `-n` or `null`. */
export function optionsOf(help: string): { short: string | null; long: string }[] {
  return [...help.matchAll(/^ +(?:(-\w), )?(--[\w-]+)/gm)]
    .map(([, short = null, long]) => ({ short, long }));
}

/** Runs a program to its end. */
export async function execute(
  words: readonly string[],
  env: Record<string, string> = {},
): Promise<Outcome> {
  const process = new Deno.Command(words[0], {
    args: words.slice(1),
    env,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  });
  const { code, signal, stdout, stderr } = await process.output();
  return {
    code,
    signal,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
    bytes: stdout,
  };
}

/** Runs a program to its end. @throws if its exit code is not 0 */
export async function succeed(...words: string[]): Promise<Outcome> {
  const outcome = await execute(words);
  if (outcome.code !== 0) {
    throw new Error(`${words.join(" ")}: exit ${outcome.code}: ${outcome.stderr}`);
  }
  return outcome;
}

/** Returns the command line that runs a shell command on a terminal, by script(1). */
export function onTerminal(shellCommand: string): string[] {
  return [..."script --quiet --return --command".split(" "), shellCommand, "/dev/null"];
}

/**
 * Runs the script under strace and tampers with one system call: the first `call` that has
 * `argument` among its arguments. Deno makes calls of the same name before and after it, so a first
 * run counts them and a second run tampers.
 *
 * @param tamper returns what strace injects into the n-th call, such as `error=EPERM:when=n`
 */
export async function inject(
  call: string,
  argument: string,
  tamper: (n: number) => string,
  args: readonly string[],
): Promise<Outcome> {
  const { stderr } = await execute(["strace", "-f", "-e", `trace=${call}`, ...command(args)]);
  const calls = stderr.split("\n").filter((line) => line.includes(`${call}(`));
  const n = calls.findIndex((line) => line.includes(argument)) + 1;
  if (n === 0) throw new Error(`no ${call} with ${argument}: ${stderr}`);
  const fault = `inject=${call}:${tamper(n)}`;
  return await execute([..."strace -f -o /dev/null -e".split(" "), fault, ...command(args)]);
}

/** Returns how many descriptors a process has open. */
export function openDescriptors(pid: number | "self" = "self"): number {
  return [...Deno.readDirSync(`/proc/${pid}/fd`)].length;
}

/** A program that runs until it is disposed of. */
export class Background implements AsyncDisposable {
  readonly child: Deno.ChildProcess;
  #said = "";
  #changed = Promise.withResolvers<void>();
  #reading: Promise<unknown>;
  #hasEnded = false;

  constructor(words: readonly string[], env: Record<string, string> = {}, cwd?: string) {
    this.child = new Deno.Command(words[0], {
      args: words.slice(1),
      env,
      cwd,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    })
      .spawn();
    this.#reading = Promise.all([this.#read(this.child.stdout), this.#read(this.child.stderr)])
      .then(() => this.#hasEnded = true);
  }

  async #read(stream: ReadableStream<Uint8Array<ArrayBuffer>>): Promise<void> {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      this.#said += text;
      this.#changed.resolve();
      this.#changed = Promise.withResolvers();
    }
  }

  /** Everything printed so far, standard output and standard error together. */
  get said(): string {
    return this.#said;
  }

  /** Whether it has ended, and all that it printed is read. */
  get hasEnded(): boolean {
    return this.#hasEnded;
  }

  /**
   * Waits until `passes` accepts what was printed so far.
   *
   * @throws if the program ends before, or does not print it within so many seconds
   */
  async until(passes: (said: string) => boolean, seconds = 60): Promise<string> {
    const waiting = this.#until(passes);
    const expected = () => `what ${passes} accepts, of ${JSON.stringify(this.#said)}`;
    return await within(waiting, expected, seconds);
  }

  async #until(passes: (said: string) => boolean): Promise<string> {
    while (!passes(this.#said)) {
      if (this.#hasEnded) {
        throw new Error(`ended before it printed the expected output: ${this.#said}`);
      }
      await Promise.race([this.#changed.promise, this.#reading]);
    }
    return this.#said;
  }

  /** Waits for the end of the program, and for the last of what it printed. */
  async end(): Promise<Deno.CommandStatus> {
    await this.#reading;
    return await this.child.status;
  }

  /** Sends a signal and waits for the end. */
  async stop(signal: Deno.Signal = "SIGTERM"): Promise<Deno.CommandStatus> {
    try {
      this.child.kill(signal);
    } catch { /* it has ended */ }
    return await this.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/** A copy of the script and of Deno that the user `nobody` may read, wherever the originals are. */
export class Nobody implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Nobody> {
    const folder = await Deno.makeTempDir({ prefix: "dscp-get-nobody-" });
    await Deno.chmod(folder, 0o755);
    const root = new URL("../..", import.meta.url).pathname;
    const parts = ["main.ts", "src", "ffi", "deno.json"].map((name) => root + name);
    await succeed("cp", "-r", ...parts, Deno.execPath(), folder);
    await succeed("chmod", "-R", "a+rX", folder);
    return new Nobody(folder);
  }

  /** The command line that runs the script as `nobody`. */
  get command(): string[] {
    const become = "setpriv --reuid=nobody --regid=nogroup --clear-groups".split(" ");
    const clean = ["env", "-i", `DENO_DIR=${this.folder}/none`];
    const deno = `${this.folder}/${Deno.execPath().split("/").at(-1)}`;
    const run = ["run", "--no-prompt", ...PERMISSIONS, `${this.folder}/main.ts`];
    return [...become, ...clean, deno, ...run];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** The CPU time of a process so far, in ticks of 10 ms, proc(5). */
export function cpuTicks(pid: number): number {
  const fields = Deno.readTextFileSync(`/proc/${pid}/stat`).split(") ")[1].split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

/** Whether a thread of a process waits for room in a pipe, which proc(5) shows as its wchan. */
export function waitsForReader(pid: number): boolean {
  return [...Deno.readDirSync(`/proc/${pid}/task`)].some(({ name }) => {
    try {
      return Deno.readTextFileSync(`/proc/${pid}/task/${name}/wchan`).endsWith("pipe_write");
    } catch {
      return false; // the thread has ended
    }
  });
}
