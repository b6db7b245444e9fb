/**
 * Standard output and standard error, the terminal's width, Ctrl-C, and lines that are replaced.
 *
 * What a run is for goes to standard output: a reply's body, a final table, the hops of a trace,
 * JSON. Report, progress and errors go to standard error. No line is wider than 80 columns, or than
 * a narrower terminal. Nothing else in this program prints.
 *
 * @module
 */

import { getenv } from "../ffi/libc.ts";
import { makeBlocking } from "../ffi/calls.ts";
import type { Reply, Sink } from "./exchange.ts";
import { Exit, Failure, isGranted } from "./failure.ts";
import { isSeries, type Options } from "./options.ts";
import { errorText, excerpt, plural, wrap } from "./text.ts";

/** How many columns may be used: a terminal's if it has fewer than 80. */
export function widthOf(output: typeof Deno.stdout | typeof Deno.stderr): number {
  return output.isTerminal() ? Math.min(80, Deno.consoleSize().columns || 80) : 80;
}

/** Whether an output is a terminal that knows escape sequences. */
function takesEscapes(output: typeof Deno.stdout | typeof Deno.stderr): boolean {
  // Deno itself would ask for --allow-env.
  return output.isTerminal() && getenv("TERM") !== "dumb";
}

/** Whether an output gets colours: https://no-color.org/ */
export function isColored(output: typeof Deno.stdout | typeof Deno.stderr): boolean {
  return !Deno.noColor && takesEscapes(output);
}

/** The exit code of a second signal, which ends the process at once, whatever is under way. */
export const forcedExit: PromiseWithResolvers<number> = Promise.withResolvers();

/** Calls `stop` with the exit code at the first SIGINT or SIGTERM; see {@linkcode forcedExit}. */
export function onInterrupt(stop: (code: number) => void): Disposable {
  let isStopping = false;
  const listener = (code: number) => () => {
    if (isStopping) return forcedExit.resolve(code);
    isStopping = true;
    stop(code);
  };
  const signals = [["SIGINT", listener(130)], ["SIGTERM", listener(143)]] as const;
  for (const [signal, act] of signals) Deno.addSignalListener(signal, act);
  return {
    [Symbol.dispose]() {
      for (const [signal, act] of signals) Deno.removeSignalListener(signal, act);
    },
  };
}

/** Whether it is known that writes to standard output wait for room. */
let isBlocking = false;

/** Writes all of `bytes` to standard output. @throws {Failure} it does not take them, exit 23 */
export async function toStandardOutput(bytes: Uint8Array | string): Promise<void> {
  if (typeof bytes === "string") bytes = new TextEncoder().encode(bytes);
  isLineOpen = bytes.at(-1) !== 0x0a && Deno.stdout.isTerminal();
  // What a pipe takes whole or not at all, pipe(7): it can be written again if it did not fit.
  const PIPE_BUF = 4096;
  try {
    if (bytes.length > PIPE_BUF) blockStandardOutput();
    // Time limits and signals go on while another thread waits for a slow reader.
    while (bytes.length > 0) bytes = bytes.subarray(await Deno.stdout.write(bytes));
  } catch (error) {
    if (error instanceof Deno.errors.WouldBlock && !isBlocking) {
      blockStandardOutput();
      return await toStandardOutput(bytes);
    }
    if (error instanceof Deno.errors.BrokenPipe) throw new Failure(Exit.cannotWrite, "");
    const message = `cannot write to standard output: ${errorText(error as Error)}`;
    throw new Failure(Exit.cannotWrite, message);
  }
}

/** A parent may have made it non-blocking, where Deno does not say how much it has written. */
function blockStandardOutput(): void {
  // The help must not need a permission.
  if (!isBlocking && isGranted({ name: "ffi" })) makeBlocking(1);
  isBlocking = true;
}

/** Where a reply goes under these options; a series is for its times, so its bodies are dropped. */
export function sinkFor(options: Options): Sink {
  const isDropped = options.json || options.trace || isSeries(options);
  const bytesOf = (line: string) => Uint8Array.from(line, (c) => c.charCodeAt(0));
  return {
    ...options.include && !isDropped && { head: (line) => toStandardOutput(bytesOf(line)) },
    ...options.fail && { begin: failOnError },
    ...!isDropped && { body: Deno.stdout.isTerminal() ? toTerminal : toStandardOutput },
  };
}

function failOnError({ status, reason }: Reply): void {
  if (status < 400) return;
  const message = excerpt(`the server answered ${status} ${reason}`.trim());
  throw new Failure(Exit.httpError, message);
}

/** A body that is not printed, as it is binary and the output a terminal. */
export class NotPrinted extends Failure {}

/** @throws {NotPrinted} the body is binary, which curl does not print either */
function toTerminal(piece: Uint8Array): Promise<void> {
  if (!piece.includes(0)) return toStandardOutput(piece);
  const message = "the reply is binary and can mess up a terminal";
  throw new NotPrinted(Exit.cannotWrite, message, "redirect it, with > FILE or through a pipe");
}

/** Whether the last line on the terminal has no end, as of a body without one. */
let isLineOpen = false;

/** Writes to standard error, from a new line on; if that is closed nobody is there to read it. */
export function toStandardError(text: string): void {
  if (isLineOpen && Deno.stderr.isTerminal()) text = `\n${text}`;
  isLineOpen = false;
  let bytes: Uint8Array = new TextEncoder().encode(text);
  try {
    while (bytes.length > 0) bytes = bytes.subarray(Deno.stderr.writeSync(bytes));
  } catch { /* see above */ }
}

/** Writes a line as wide as the terminal, or for a program a whole one. */
export function lineToStandardError(line: string): void {
  const isTerminal = Deno.stderr.isTerminal();
  toStandardError(isTerminal ? wrap(line, widthOf(Deno.stderr)) : `${line}\n`);
}

/** Writes lines to standard error without waiting for its reader; what does not fit is counted. */
export class Log {
  /** Resolves when all lines so far are written, or nobody is there to read them. */
  written: Promise<void> = Promise.resolve();
  #waiting = "";
  #dropped = 0;
  #isWriting = false;

  /** Adds a line, without its end. */
  add(line: string): void {
    const MOST_WAITING = 64 * 1024;
    if (this.#waiting.length > MOST_WAITING) this.#dropped++;
    else this.#waiting += `${line}\n`;
    if (!this.#isWriting) this.written = this.#write();
  }

  async #write(): Promise<void> {
    this.#isWriting = true;
    try {
      // A parent may have made it non-blocking, where Deno does not say how much it has written.
      makeBlocking(2);
      while (this.#waiting !== "") {
        const dropped = this.#dropped > 0 ? `… ${plural(this.#dropped, "line")} dropped\n` : "";
        let bytes: Uint8Array = new TextEncoder().encode(this.#waiting + dropped);
        this.#waiting = "";
        this.#dropped = 0;
        while (bytes.length > 0) bytes = bytes.subarray(await Deno.stderr.write(bytes));
      }
    } catch { /* standard error is closed */ }
    this.#isWriting = false;
  }
}

/** Lines on a terminal's standard error that are replaced by newer ones. */
export class LiveText implements Disposable {
  readonly #isLive: boolean;
  /** How long the lines are that were drawn last. */
  #drawn: number[] = [];
  #drawnAt = -Infinity;

  constructor(isWanted: boolean) {
    this.#isLive = isWanted && takesEscapes(Deno.stderr);
  }

  /** Draws ten times a second at most. @param text gets the number of columns */
  update(text: (width: number) => string): void {
    if (!this.#isLive || performance.now() - this.#drawnAt < 100) return;
    // A line as wide as the terminal may wrap; what scrolls off the screen cannot be replaced.
    const width = widthOf(Deno.stderr) - 1, { rows } = Deno.consoleSize();
    const lines = text(width).trimEnd().split("\n").map((line) => line.slice(0, width));
    const shown = lines.length < rows ? lines : lines.slice(-1);
    this.clear();
    toStandardError(shown.map((line) => `${line}\n`).join(""));
    this.#drawn = shown.map(({ length }) => length);
    this.#drawnAt = performance.now();
  }

  /** Removes what was drawn last, and what was typed behind it. */
  clear(): void {
    if (this.#drawn.length === 0) return;
    // A terminal that has become narrower has wrapped the lines.
    const { columns } = Deno.consoleSize();
    const heights = this.#drawn.map((length) => Math.max(1, Math.ceil(length / (columns || 80))));
    // Line by line: erasing all of a screen at once puts it into the scrollback of some terminals.
    const up = "\x1b[A\x1b[2K".repeat(heights.reduce((sum, height) => sum + height));
    toStandardError(`\r\x1b[K${up}`);
    this.#drawn = [];
  }

  /** {@linkcode clear} */
  [Symbol.dispose](): void {
    this.clear();
  }
}
