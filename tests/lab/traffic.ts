/**
 * Traffic for the lab: GETs at a steady pace, one large reply, and bulk flows that fill a link, each
 * in a process of its own inside a namespace; and counters of what passes.
 *
 * @module
 */

import { type Exchange, get, RequestFailure } from "../../main.ts";
import { Row } from "../../src/series.ts";
import type { Mark } from "../../ffi/mod.ts";
import type { Namespace } from "../support/namespaces.ts";
import { Background, execute } from "../support/processes.ts";
import { until } from "../support/waiting.ts";

const say = (text: string) => Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));

/** What a scene needs of its caller. */
export interface Stage {
  /** Ends the scene early. */
  readonly signal?: AbortSignal;
  /** Shows what is being measured, and for about how many seconds. */
  step?(text: string, seconds: number): void;
}

/** Waits. @throws the signal's reason as soon as it is aborted */
export async function sleep(milliseconds: number, signal?: AbortSignal): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, Math.max(0, milliseconds));
  const stop = () => reject(signal!.reason);
  signal?.throwIfAborted();
  signal?.addEventListener("abort", stop);
  try {
    await promise;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", stop);
  }
}

/** Starts this module in a namespace, as one of the parts at its end. */
function start(host: Namespace, part: keyof typeof PARTS, argument = ""): Background {
  const deno = [Deno.execPath(), "run", "--allow-all", import.meta.filename!];
  return new Background([...host.under, ...deno, part, argument]);
}

// ─── GETs ────────────────────────────────────────────────────────────────────────────────────────

/** One way of asking. */
export interface Way {
  /** The mark, whose name is the label in tables and pictures. */
  readonly mark: Mark;
  readonly markSyn: boolean;
}

/** GETs at a steady pace, whether or not earlier ones have been answered. */
export interface Plan {
  readonly url: string;
  readonly ways: readonly Way[];
  /** Milliseconds in which each way asks once, in turn. */
  readonly every: number;
  /** How many times each way asks. */
  readonly ticks: number;
  /** Seconds after which a GET has failed. */
  readonly maxTime: number;
  /** A large reply to read as well, and its delay in milliseconds. */
  readonly large?: { readonly url: string; readonly after: number };
}

/** One GET. */
export interface Answer {
  /** Which of the plan's ways; -1 is the large reply. */
  readonly way: number;
  /** When it began and ended, in milliseconds since 1970. */
  readonly from: number;
  readonly to: number;
  /** A row with this request alone. */
  readonly row: Row;
}

/** GETs that are being made. */
export class Asking implements AsyncDisposable {
  private constructor(readonly process: Background, readonly began: number) {}

  /** Starts them in a namespace, and waits for the first tick. */
  static async start(host: Namespace, plan: Plan): Promise<Asking> {
    const process = start(host, "ask", JSON.stringify(plan));
    await process.until((said) => said.includes("began "));
    return new Asking(process, Number(/^began (.*)$/m.exec(process.said)![1]));
  }

  /** Waits for the last one. @throws if the process ends before */
  async answers(): Promise<Answer[]> {
    await this.process.until((said) => said.includes("done\n"), 300);
    return this.process.said.split("\n").filter((line) => line.startsWith("{")).map((line) => {
      const { row, ...rest } = JSON.parse(line);
      return { ...rest, row: { ...row, sent: new Set(row.sent), arrived: new Set(row.arrived) } };
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process.stop("SIGKILL");
  }
}

/** One row for all of these. */
export function rowOf(mark: Mark, answers: readonly Answer[]): Row {
  const sum = new Row(mark);
  for (const { row } of answers) {
    sum.requests += row.requests;
    sum.failed += row.failed;
    sum.wrong += row.wrong;
    for (const tos of row.sent) sum.sent.add(tos);
    for (const tos of row.arrived) sum.arrived.add(tos);
    sum.connect.push(...row.connect);
    sum.total.push(...row.total);
  }
  return sum;
}

async function ask(argument: string): Promise<void> {
  const { url, ways, every, ticks, maxTime, large }: Plan = JSON.parse(argument);
  await warmUp(ways);
  const one = async (url: string, way: number, maxTime: number) => {
    const { mark, markSyn } = ways[Math.max(0, way)];
    const exchange = await exchangeOf(url, { dscp: mark.dscp, markSyn, maxTime });
    const row = new Row(mark);
    row.add(exchange);
    const from = performance.timeOrigin + exchange.started;
    const answer: Answer = { way, from, to: from + exchange.milliseconds.total!, row };
    say(JSON.stringify(answer, (_, value) => value instanceof Set ? [...value] : value));
  };
  const began = performance.now(), all: Promise<void>[] = [];
  say(`began ${performance.timeOrigin + began}`);
  if (large !== undefined) all.push(sleep(large.after).then(() => one(large.url, -1, 20)));
  for (let turn = 0; turn < ticks * ways.length; turn++) {
    await sleep(began + turn * every / ways.length - performance.now());
    all.push(one(url, turn % ways.length, maxTime));
  }
  await Promise.all(all);
  say("done");
  // The counters of this namespace are read through this process, until it is killed.
  setInterval(() => {}, 60_000);
}

async function exchangeOf(...[url, options]: Parameters<typeof get>): Promise<Exchange> {
  try {
    return await get(url, options);
  } catch (error) {
    if (error instanceof RequestFailure) return error.exchange;
    throw error;
  }
}

/** Unmeasured requests, so that none pays for the loading and compiling of code. */
async function warmUp(ways: readonly Way[]): Promise<void> {
  const server = Deno.serve(
    { port: 0, hostname: "127.0.0.1", onListen() {} },
    () => new Response(),
  );
  const url = `http://127.0.0.1:${server.addr.port}/`;
  for (const { markSyn } of ways) for (let at = 0; at < 16; at++) await get(url, { markSyn });
  await server.shutdown();
}

// ─── A large reply ───────────────────────────────────────────────────────────────────────────────

/** The port of {@linkcode serveLarge}. */
export const LARGE_PORT = 8087;

/** A server in a namespace that replies with so many bytes. */
export async function serveLarge(host: Namespace, bytes: number): Promise<Background> {
  const server = start(host, "large", String(bytes));
  await server.until((said) => said.includes("ready"));
  return server;
}

function large(bytes: string): void {
  const body = new Uint8Array(Number(bytes));
  const onListen = () => say("ready");
  Deno.serve({ hostname: "0.0.0.0", port: LARGE_PORT, onListen }, () => new Response(body));
}

// ─── Bulk flows ──────────────────────────────────────────────────────────────────────────────────

const BULK_PORT = 5001, FLOWS = 4;

/** Four flows that send as fast as the network takes it, until disposed of. */
export class Bulk implements AsyncDisposable {
  private constructor(readonly sink: Background, readonly source: Background) {}

  /** Starts them from one host to another, and waits until they send. */
  static async start(from: Namespace, to: Namespace, address: string): Promise<Bulk> {
    const sink = start(to, "sink");
    await sink.until((said) => said.includes("ready"));
    const source = start(from, "source", address);
    await source.until((said) => said.includes("ready"));
    return new Bulk(sink, source);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Without the source, its kernel would go on to send what is in the socket buffers. Without the
    // sink, the connections are reset.
    await this.sink.stop("SIGKILL");
    await this.source.stop("SIGKILL");
  }
}

async function sink(): Promise<void> {
  const listener = Deno.listen({ hostname: "0.0.0.0", port: BULK_PORT });
  say("ready");
  for await (const conn of listener) conn.readable.pipeTo(new WritableStream()).catch(() => {});
}

async function source(hostname: string): Promise<void> {
  const bytes = new Uint8Array(65536);
  let sending = 0;
  const flow = async () => {
    const conn = await Deno.connect({ hostname, port: BULK_PORT });
    await conn.write(bytes);
    if (++sending === FLOWS) say("ready");
    for (;;) await conn.write(bytes);
  };
  await Promise.all(Array.from({ length: FLOWS }, flow));
}

// ─── Counters ────────────────────────────────────────────────────────────────────────────────────

/** What a device's queue holds and has done. */
export interface Queue {
  readonly drops: number;
  /** Packets and bytes that wait. */
  readonly qlen: number;
  readonly backlog: number;
}

/** Reads the counters of the root queue of a device. */
export async function readQueue(host: Namespace, device: string): Promise<Queue> {
  const words = ["tc", "-n", host.name, "-s", "-j", "qdisc", "show", "dev", device];
  const { code, stdout, stderr } = await execute(words);
  if (code !== 0) throw new Error(`${words.join(" ")}: ${stderr}`);
  return JSON.parse(stdout).find(({ root }: { root?: boolean }) => root);
}

/** Waits until so many packets wait in the queue of a device. */
export async function fillQueue(
  host: Namespace,
  device: string,
  packets: number,
  signal?: AbortSignal,
): Promise<void> {
  await until(
    async () => {
      signal?.throwIfAborted();
      return (await readQueue(host, device)).qlen >= packets;
    },
    `${packets} packets in the queue of ${device}`,
    60,
  );
}

/** Bytes that a device has received, in the namespace of a process. */
export function receivedBytes({ child: { pid } }: Background, device: string): number {
  const text = Deno.readTextFileSync(`/proc/${pid}/net/dev`);
  return Number(new RegExp(`\\b${device}: *(\\d+)`).exec(text)![1]);
}

/** TCP segments that were sent again, in the namespace of a process. */
export function retransmitted({ child: { pid } }: Background): number {
  const text = Deno.readTextFileSync(`/proc/${pid}/net/snmp`);
  const [names, values] = text.match(/^Tcp: .*$/gm)!.map((line) => line.split(" "));
  return Number(values[names.indexOf("RetransSegs")]);
}

/** Reads a value every 100 ms, with the time in milliseconds since 1970, while an action runs. */
export async function sampling<S, T>(
  read: () => S | Promise<S>,
  action: () => Promise<T>,
  signal?: AbortSignal,
): Promise<{ samples: { at: number; value: S }[]; result: T }> {
  const samples: { at: number; value: S }[] = [];
  let isRunning = true;
  const sample = async () => {
    while (isRunning) {
      const at = Date.now();
      samples.push({ at, value: await read() });
      await sleep(at + 100 - Date.now(), signal);
    }
  };
  const acting = action().finally(() => isRunning = false);
  const [, result] = await Promise.all([sample(), acting]);
  return { samples, result };
}

/** Mbit/s between each sample of a byte counter and the next, by the seconds since `began`. */
export function rates(
  samples: readonly { readonly at: number; readonly value: number }[],
  began: number,
): [seconds: number, mbits: number][] {
  return samples.slice(1).map(({ at, value }, before) => {
    const last = samples[before];
    return [(at - began) / 1000, (value - last.value) * 8 / 1000 / (at - last.at)];
  });
}

const PARTS = { ask, large, sink, source };

if (import.meta.main) await PARTS[Deno.args[0] as keyof typeof PARTS](Deno.args[1]);
