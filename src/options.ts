/**
 * One table of options: the parser and the defaults here, `--help` and completions from it.
 *
 * @module
 */

import { type Mark, markOf, parseDscp, parseIpTos, parseTos } from "../ffi/dscp.ts";
import type { RequestOptions } from "./exchange.ts";
import { Exit, Failure, isGranted } from "./failure.ts";
import {
  byteHint,
  dscpHint,
  LIST_HINT,
  refuseMarks,
  unknownOption,
  usageError,
} from "./suggest.ts";
import { DEFAULT_HOST, type Header } from "./target.ts";
import { errorText, plural, printable, quote, trimmed } from "./text.ts";

/** The most hops of a trace, and the seconds that it may take unless the user says otherwise. */
export const MAX_HOPS = 64, TRACE_TIMEOUT = 60;

// Timers hold milliseconds in 31 bits.
const MAX_SECONDS = 2_147_483;

export const REQUEST_DEFAULTS: RequestOptions = {
  headers: [],
  markSyn: false,
  family: null,
  trust: null,
  expect: null,
  connectTimeout: 10,
  maxTime: 30,
  requireProof: false,
};

/** What a run without arguments does; the help describes each option. */
export const DEFAULTS = {
  ...REQUEST_DEFAULTS,
  url: null as string | null,
  marks: [markOf(0xb8)] as readonly Mark[],
  /** What is to arrive: what is sent (none), one mark for all of `marks`, or one for each. */
  expect: [] as readonly Mark[],
  count: 1,
  interval: 0,
  trace: false,
  maxHops: 30,
  insecure: false,
  cacert: null as string | null,
  serve: null as { readonly hostname: string; readonly port: number } | null,
  /** The mark of the server's replies; `null` for that of the request. */
  replyMark: null as Mark | null,
  include: false,
  fail: false,
  silent: false,
  json: false,
  print: null as "help" | "version" | Shell | null,
};

/** A shell that `--completions` writes a script for. */
export type Shell = "bash" | "zsh" | "fish";

export const SHELLS: readonly Shell[] = ["bash", "zsh", "fish"];

/** What the command line asks for. */
export type Options = Readonly<typeof DEFAULTS>;

/** Whether more than one request is asked for. */
export function isSeries(options: Options): boolean {
  return options.marks.length * options.count > 1;
}

/** The help of an option, and what it does to the options; `flag` is its name as it was given. */
type Option = readonly [help: string, apply: Apply];

type Changeable = { -readonly [K in keyof Options]: Options[K] };
type Apply = (options: Changeable, value: string, flag: string) => void;

export const OPTIONS: Record<string, Record<string, Option>> = {
  "The mark": {
    "-d, --dscp NAME[,NAME…]": [
      "EF (the default), VA or VOICE-ADMIT, NQB, LE, DF or BE, CS0 to CS7, AF11 to AF43, or a " +
      "number from 0 to 63; several take turns; all means all 64",
      (o, v) => o.marks = [...o.marks === DEFAULTS.marks ? [] : o.marks, ...parseMarks(v)],
    ],
    "    --tos BYTE": [
      "the whole ToS byte or Traffic Class, such as 184 or 0xB8; its two ECN bits must be 0",
      (o, v) => o.marks = [parseByte(v)],
    ],
    "    --ip-tos BYTE": [
      "as in curl: the whole byte, or a name of -d, LOWDELAY, THROUGHPUT or RELIABILITY",
      (o, v) => o.marks = [asUsageError(() => parseIpTos(v))],
    ],
    "    --expect NAME[,…]": [
      "what is to arrive, if the path is meant to change the mark: one for all of -d, or one for " +
      "each; anything else is 102",
      (o, v) => o.expect = [...o.expect, ...parseMarks(v)],
    ],
    "    --mark-syn": [
      "mark the handshake too: on a busy link an unmarked SYN waits in the queue",
      (o) => o.markSyn = true,
    ],
  },
  "The request": {
    "-H, --header LINE": [
      "'Name: value' adds or replaces a header, 'Name:' removes one, 'Name;' sends it empty",
      (o, v) => o.headers = [...o.headers, parseHeader(v)],
    ],
    "-4, --ipv4": ["IPv4 addresses only", (o) => o.family = 4],
    "-6, --ipv6": ["IPv6 addresses only", (o) => o.family = 6],
    "    --connect-timeout S": [
      "time limit for connecting in seconds (default 10, with --trace 60; 0: none)",
      (o, v, flag) => o.connectTimeout = parseSeconds(flag, v),
    ],
    "-m, --max-time S": [
      "time limit for each request in seconds, and for the path of --trace (default 30; 0: none)",
      (o, v, flag) => o.maxTime = parseSeconds(flag, v),
    ],
    "-k, --insecure": ["accept any certificate", (o) => o.insecure = true],
    "    --cacert FILE": [
      "trust only FILE's certificates (PEM; --allow-read)",
      (o, v) => o.cacert = v,
    ],
  },
  "The output": {
    "-i, --include": ["status line and headers before the body", (o) => o.include = true],
    "-f, --fail": ["exit 22 on status 400 and above, without the body", (o) => o.fail = true],
    "    --require-proof": [
      "exit 104 unless the whole request was seen leaving, and arriving if --serve answers",
      (o) => o.requireProof = true,
    ],
    "-s, --silent": ["no report", (o) => o.silent = true],
    "-S, --show-error": ["accepted as in curl: errors are always shown", () => {}],
    "    --json": [
      "JSON Lines instead of body and report: one object for each request",
      (o) => o.json = true,
    ],
    "    --completions SHELL": [
      "completion script for bash, zsh or fish, for an installed dscp-get",
      (o, v) => o.print ??= parseShell(v),
    ],
    "-V, --version": ["the version", (o) => o.print ??= "version"],
    "-h, --help": ["this text", (o) => o.print ??= "help"],
  },
  "Did the network care?": {
    "-n, --count N": [
      "N rounds of requests, the marks of each in random order, and a table of their times; one " +
      "more request, which is not measured, goes to the target first",
      (o, v, flag) => o.count = parseWhole(flag, v, 1_000_000),
    ],
    "    --interval S": [
      "seconds between requests (default 0)",
      (o, v, flag) => o.interval = parseSeconds(flag, v),
    ],
  },
  "Where is the mark changed?": {
    "    --trace": [
      "what each router on the path received, hop by hop, and between which two the mark is " +
      "changed; exact on IPv6, on IPv4 only as root",
      (o) => o.trace = true,
    ],
    "    --max-hops N": [
      "the most hops to try, 1 to 64 (default 30)",
      (o, v, flag) => o.maxHops = parseWhole(flag, v, MAX_HOPS),
    ],
  },
  "The far end": {
    "    --serve [HOST:]PORT": [
      "answer GET and HEAD with the marks that arrived, until Ctrl-C; HOST is " +
      `${DEFAULT_HOST} unless given, '[::]' or nothing before the colon means all addresses; ` +
      "replies carry the mark of -d if it is given, SYN-ACK included, else that of the request",
      (o, v) => o.serve = parseListen(v),
    ],
  },
};

/** The options one by one: `--name` is the last of the flags; a switch has `""` for a value. */
export function optionRows(): { flags: string[]; value: string; help: string; apply: Apply }[] {
  return Object.values(OPTIONS).flatMap(Object.entries<Option>).map(([label, [help, apply]]) => {
    const [long, value = ""] = label.slice(4).split(" ");
    const flags = label.startsWith("-") ? [label.slice(0, 2), long] : [long];
    return { flags, value, help, apply };
  });
}

function parseShell(text: string): Shell {
  const shell = SHELLS.find((name) => name === text);
  if (shell !== undefined) return shell;
  throw usageError(`--completions takes bash, zsh or fish, not ${quote(text)}`);
}

/** Reads the command line. @throws {Failure} bad usage, exit 2 */
export function parseArguments(args: readonly string[]): Options {
  // Deno puts U+FFFD for each byte that is not UTF-8.
  const broken = args.find((word) => word.includes("\ufffd"));
  if (broken !== undefined) {
    const hint = "a URL can have any byte, as %FF";
    throw usageError(`${quote(broken)} is not UTF-8, or contains U+FFFD`, hint);
  }
  const options: Changeable = { ...DEFAULTS }, urls: string[] = [], seen = new Set<string>();
  const words = [...args];
  let rows: ReturnType<typeof optionRows> | null = null;
  for (let word; (word = words.shift()) !== undefined;) {
    if (word === "--") urls.push(...words.splice(0));
    else if (!/^-./.test(word)) urls.push(word);
    else {
      // --name, --name=value, or letters of which the last may have its value right behind it
      const isLong = word.startsWith("--");
      const [, flag, rest] = (isLong ? /^(--[^=]*)(?:=([^]*))?$/ : /^(-.)([^]+)?$/u).exec(word)!;
      rows ??= optionRows();
      const option = rows.find(({ flags }) => flags.includes(flag));
      if (option === undefined) throw unknownOption(flag, rows.map(({ flags }) => flags.at(-1)!));
      const { flags, apply } = option, hasValue = option.value !== "";
      if (!hasValue && rest !== undefined) {
        if (isLong) throw usageError(`${flag} takes no value`);
        // The letters behind a switch are options too, and "-" is none.
        if (rest.startsWith("-")) throw unknownOption(word, []);
        words.unshift(`-${rest}`);
      }
      const value = hasValue ? rest ?? words.shift() : "";
      if (value === undefined) throw usageError(`${flag} needs a value`);
      apply(options, value, flag);
      seen.add(flags.at(-1)!);
    }
  }
  if (options.print === null) refuseMarks(urls, seen.has("--dscp"));
  if (urls.length > 1) {
    throw usageError(`one URL at a time, not ${urls.length}: ${urls.map(quote).join(" ")}`);
  }
  if (seen.size > 0 && options.print === null) checkCombinations(options, seen, urls);
  if (options.trace && !seen.has("--connect-timeout")) {
    options.connectTimeout = traceTimeout(seen.has("--max-time") ? options.maxTime : 0);
  }
  if (options.serve !== null && MARKING.some((name) => seen.has(name))) {
    options.replyMark = options.marks[0];
  }
  return { ...options, url: urls[0] ?? null };
}

const MARKING = ["--dscp", "--tos", "--ip-tos"];

/** @throws {Failure} options that exclude each other, or that do nothing beside others */
function checkCombinations(options: Options, seen: Set<string>, urls: readonly string[]): void {
  const [mark, other] = MARKING.filter((name) => seen.has(name));
  if (other !== undefined) {
    throw usageError(`${mark} and ${other} are mutually exclusive: give one of them`);
  }
  if (options.serve !== null && urls.length > 0) {
    throw usageError("--serve takes no URL: it is the far end");
  }
  const allowed = ["--serve", "--silent", "--show-error", ...MARKING];
  const beside = [...seen].find((name) => !allowed.includes(name));
  if (options.serve !== null && options.marks.length > 1) {
    throw usageError(`--serve takes one mark for its replies, not ${options.marks.length}`);
  }
  if (options.serve !== null && beside !== undefined) {
    throw usageError(`${beside} cannot be combined with --serve: it is for requests`);
  }
  const { marks, expect } = options;
  if (expect.length > 1 && expect.length !== marks.length) {
    const given = `${expect.length} for ${plural(marks.length, "mark")}`;
    throw usageError(`--expect takes one mark, or one for each of -d, not ${given}`);
  }
  const isMany = !options.trace && (isSeries(options) || seen.has("--count"));
  const isShown = !options.trace && !isSeries(options) && !options.json;
  const useless = {
    ...!options.trace && { "--max-hops": "it is for --trace" },
    ...!isMany && { "--interval": "it is for series" },
    ...options.trace && { "--expect": "a trace shows what each router received" },
    ...!isShown && { "--include": "no reply is printed in a series, a trace or JSON" },
  };
  for (const [name, why] of Object.entries(useless)) {
    if (seen.has(name)) throw usageError(`${name} does nothing here: ${why}`);
  }
  if (options.trace && seen.has("--count")) {
    const why = "a trace is one request for each mark";
    throw usageError(`--trace and --count are mutually exclusive: ${why}`);
  }
}

function asUsageError<T>(parse: () => T, hint?: () => string | undefined): T {
  try {
    return parse();
  } catch (error) {
    throw error instanceof RangeError ? usageError(error.message, hint?.()) : error;
  }
}

function parseMarks(text: string): Mark[] {
  return text.split(",").flatMap((word) => {
    const name = word.trim();
    if (name.toLowerCase() === "all") return Array.from({ length: 64 }, (_, n) => markOf(n << 2));
    return [asUsageError(() => parseDscp(name), () => name === "" ? LIST_HINT : byteHint(name))];
  });
}

function parseByte(text: string): Mark {
  return asUsageError(() => parseTos(text), () => dscpHint(text));
}

function parseWhole(option: string, text: string, max: number): number {
  const number = /^[1-9]\d*$/.test(text) ? Number(text) : NaN;
  if (number <= max) return number;
  throw usageError(`${option} takes a number from 1 to ${max}, not ${quote(text)}`);
}

function parseSeconds(option: string, text: string): number {
  const seconds = /^(\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
  if (seconds <= MAX_SECONDS) return seconds;
  const range = `seconds from 0 to ${MAX_SECONDS}, such as 5 or 0.5`;
  throw usageError(`${option} takes ${range}, not ${quote(text)}`);
}

function parseListen(text: string): { hostname: string; port: number } {
  const parts = /^(?:(?:\[([^\]]+)\]|([^:[\]]*)):)?(\d{1,5})$/.exec(text);
  if (parts === null || Number(parts[3]) > 65535) {
    const forms = "PORT, :PORT, HOST:PORT or [IPv6]:PORT, PORT from 0 to 65535";
    throw usageError(`--serve takes ${forms}, not ${quote(text)}`);
  }
  const [, ipv6, name = DEFAULT_HOST, port] = parts;
  const host = ["", "*"].includes(name) ? "::" : name;
  return { hostname: ipv6?.replace(/%25(?=.)/, "%") ?? host, port: Number(port) };
}

/** Reads a header in the forms of curl's `-H`. */
function parseHeader(text: string): Header {
  const [, name, separator, rest] = /^([^:;]*)([:;]?)([^]*)$/.exec(text)!;
  checkHeader(name, rest, text);
  const value = trimmed(rest);
  if (separator === ":") return [name, value === "" ? null : value];
  if (separator === ";" && value === "") return [name, ""];
  const forms = "'Name: value', 'Name:' to remove one or 'Name;' for an empty one";
  throw usageError(`${quote(text)} is not a header: it must be ${forms}`);
}

/** @throws {Failure} the header would break the request */
function checkHeader(name: string, value: string, text = `${name}: ${value}`): void {
  // RFC 9110 sections 5.6.2 and 5.5
  if (!/^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/.test(name)) {
    const allowed = "letters, digits or !#$%&'*+-.^_`|~, as in 'Name: value'";
    throw usageError(`${quote(text)} is not a header: its name must be ${allowed}`);
  }
  if (!value.isWellFormed()) throw usageError(`${quote(text)} is not a header: it is not Unicode`);
  if (/[\r\n\0]/.test(value)) {
    throw usageError(`${quote(text)} is not a header: it must not contain CR, LF or NUL`);
  }
}

/** What is to arrive of the mark at a place in `options.marks`; `null` for what is sent. */
export function expectedOf({ expect }: Options, at: number): Mark | null {
  return expect[expect.length > 1 ? at : 0] ?? null;
}

/** How the first mark's requests are to be made. @throws {Failure} 77 or 103, about `--cacert` */
export async function requestOptionsOf(options: Options): Promise<RequestOptions> {
  const { cacert, insecure } = options;
  const caCerts = cacert === null ? [] : await readCertificates(cacert);
  const trust = cacert !== null || insecure ? { caCerts, insecure } : null;
  return { ...options, trust, expect: expectedOf(options, 0) };
}

/** @throws {Failure} the file cannot be read (77), or may not (103) */
async function readCertificates(file: string): Promise<string[]> {
  if (file === "") throw new Failure(Exit.badCaFile, "--cacert needs the name of a file");
  if (!isGranted({ name: "read", path: file })) {
    const hint = `run with --allow-read or --allow-read=${printable(file)}`;
    throw new Failure(Exit.cannotRun, `no permission to read ${quote(file)}`, hint);
  }
  let text: string;
  try {
    text = Deno.readTextFileSync(file);
  } catch (error) {
    throw new Failure(Exit.badCaFile, `cannot read ${quote(file)}: ${errorText(error as Error)}`);
  }
  const parts = text.split(/^(?=-----BEGIN CERTIFICATE-----)/m);
  const certificates = parts.filter((part) => part.startsWith("-----BEGIN CERTIFICATE-----"));
  if (certificates.length === 0) {
    throw new Failure(Exit.badCaFile, `${quote(file)} holds no certificate in PEM form`);
  }
  const { X509Certificate } = await import("node:crypto");
  for (const [at, certificate] of certificates.entries()) {
    try {
      new X509Certificate(certificate);
    } catch {
      throw new Failure(Exit.badCaFile, `certificate ${at + 1} in ${quote(file)} is broken`);
    }
  }
  return certificates;
}

/** Seconds for the path of a trace if only those for its request are given; 0 is no limit. */
export function traceTimeout(maxTime = 0): number {
  return Math.min(maxTime || Infinity, TRACE_TIMEOUT);
}

/** How a program's requests are made; what is left out has the default. */
export interface GetOptions extends Partial<RequestOptions> {
  /** The mark: a name such as `"EF"` (the default), or a number from 0 to 63. */
  readonly dscp?: string | number;
}

/** Fills in the defaults. @throws {Failure | RangeError} a bad header, or no time limit */
export function withDefaults<T extends GetOptions>(
  defaults: T,
  options: { [K in keyof T]?: unknown },
): T {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const all: T = { ...defaults, ...Object.fromEntries(given) };
  for (const [name, value] of all.headers ?? []) checkHeader(name, value ?? "");
  for (const limit of [all.connectTimeout, all.maxTime]) {
    if (limit === undefined || (limit >= 0 && limit <= MAX_SECONDS)) continue;
    throw new RangeError(`${limit} is no time limit; allowed are 0 to ${MAX_SECONDS} seconds`);
  }
  return all;
}
