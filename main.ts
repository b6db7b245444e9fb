#!/usr/bin/env -S deno run --allow-net --allow-ffi
/**
 * Sends one HTTP GET whose packets carry a DSCP mark, and proves it.
 *
 * ```sh
 * deno run --allow-net --allow-ffi main.ts                 # EF, to 127.0.0.1:8086 or the built-in server
 * deno run --allow-net --allow-ffi main.ts -d AF41 http://[::1]:8086/
 * deno run --allow-net --allow-ffi main.ts --json http://127.0.0.1:8086/
 * ```
 *
 * The sections stand in the order in which a request happens: arguments, target, ask, reply,
 * verdict, report; then series of requests, traces, the far end, and `main`. What touches the kernel is in
 * `ffi/`, what speaks HTTP or talks to a person is here.
 *
 * @module
 */

import { needsOwnSocket, prepareConnect } from "./ffi/conn.ts";
import { netPermission } from "./ffi/permission.ts";
import { makeBlocking, widenPipe } from "./ffi/pipe.ts";
import { pause } from "./ffi/wait.ts";
import type { Climb } from "./ffi/path.ts";
import {
  type Arrived,
  CannotRunError,
  type ConnectOptions,
  describe,
  DescriptorError,
  formatAddress,
  hex,
  type Hop,
  keepArrivals,
  LibcError,
  type Mark,
  MarkedConn,
  MarkError,
  markOf,
  parseDscp,
  parseTos,
  readArrived,
  sameDscp,
  type SentPacket,
  setTos,
  type Trust,
} from "./ffi/mod.ts";

const VERSION = "0.2.0";
const DEFAULT_HOST = "127.0.0.1";
const DEFAULT_PORT = 8086;

/** The exit codes; those below 100 are curl's. */
export const Exit = {
  ok: 0,
  usage: 2,
  badUrl: 3,
  hostNotFound: 6,
  cannotConnect: 7,
  badReply: 8,
  endedEarly: 18,
  httpError: 22,
  cannotWrite: 23,
  timeout: 28,
  tlsFailed: 35,
  emptyReply: 52,
  connectionLost: 56,
  badCertificate: 60,
  badCaFile: 77,
  notMarked: 100,
  leftChanged: 101,
  arrivedChanged: 102,
  cannotRun: 103,
  notProved: 104,
} as const;

/** What ends a run: an exit code, one line for a person, and perhaps a hint on what to do. */
export class Failure extends Error {
  /** The request that failed, as far as it came; `null` if it is not about one. */
  exchange: Exchange | null = null;

  /**
   * Describes a failure.
   *
   * @param code the exit code, one of {@linkcode Exit}
   * @param message one line, free of control characters; empty if nobody is left to read it
   * @param hint what to do about it
   */
  constructor(readonly code: number, message: string, readonly hint?: string) {
    super(message);
    this.name = "Failure";
  }
}

/** Escapes control and bidirectional formatting characters, so that text is safe to print. */
export function printable(text: string): string {
  // Nearly all text is plain, and the classes below take long to compile.
  if (/^[ -~]*$/.test(text)) return text;
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, (c) => {
    const code = c.codePointAt(0)!.toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u{${code}}`;
  });
}

/** The beginning of a text that may be long, safe to print. */
function excerpt(text: string): string {
  return printable(text.length > 200 ? `${text.slice(0, 200)}…` : text);
}

function quote(text: string): string {
  return `'${printable(text)}'`;
}

function plural(count: number, unit: string): string {
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

/** Wraps text at `width` columns; a longer word gets its own line, and each line its end. */
function wrapped(text: string, width: number): string {
  width = Math.max(1, width);
  return text.replace(new RegExp(`([^ ]{${width},}|.{1,${width}})(?: |$)`, "g"), "$1\n");
}

/** How many columns may be used: a terminal's if it has fewer than 80. */
function widthOf(output: typeof Deno.stdout | typeof Deno.stderr): number {
  return output.isTerminal() ? Math.min(80, Deno.consoleSize().columns || 80) : 80;
}

/** Calls `stop` with the exit code at the first SIGINT or SIGTERM; the second ends the process. */
function onInterrupt(stop: (code: number) => void): Disposable {
  let isStopping = false;
  const listener = (code: number) => () => {
    if (isStopping) Deno.exit(code);
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

/** The message of a system or TLS error, without the number or the link that Deno adds. */
function reason(error: Error): string {
  const bare = error.message.replace(/ \(os error \d+\)(: .*)?$|: https:\/\/\S+$|: $/, "");
  return printable(bare.replace(/^[A-Z](?![A-Z])/, (c) => c.toLowerCase()));
}

// ─── Usage ──────────────────────────────────────────────────────────────────────────────────────

/** A header of the request: its name, and its value or `null` to leave it out. */
export type Header = readonly [name: string, value: string | null];

/** The most hops of a trace, and the seconds that it may take unless the user says otherwise. */
const MAX_HOPS = 64, TRACE_TIMEOUT = 60;
// Timers hold milliseconds in 31 bits.
const MAX_SECONDS = 2_147_483;

/** How requests are made. */
export interface AskOptions {
  /** Headers of the user: a value adds or replaces, `null` removes. */
  readonly headers: readonly Header[];
  /** Whether the mark is set before the SYN leaves. */
  readonly markSyn: boolean;
  /** 4 or 6 for one address family only. */
  readonly family: 4 | 6 | null;
  /** What https trusts; `null` for the usual roots. */
  readonly trust: Trust | null;
  /** Seconds to connect in, TLS's handshake included (10); 0 is no limit. */
  readonly connectTimeout: number;
  /** Seconds for the whole request (30); 0 is no limit. */
  readonly maxTime: number;
  /** Whether to fail with 104 unless the whole request was seen leaving, and a far end reports. */
  readonly requireProof: boolean;
}

const ASK_DEFAULTS: AskOptions = {
  headers: [],
  markSyn: false,
  family: null,
  trust: null,
  connectTimeout: 10,
  maxTime: 30,
  requireProof: false,
};

/** What a run without arguments does; the help describes each option. */
export const DEFAULTS = {
  ...ASK_DEFAULTS,
  url: null as string | null,
  marks: [markOf(0xb8)] as readonly Mark[],
  count: 1,
  interval: 0,
  trace: false,
  maxHops: 30,
  insecure: false,
  cacert: null as string | null,
  serve: null as { readonly hostname: string; readonly port: number } | null,
  include: false,
  fail: false,
  silent: false,
  json: false,
  print: null as "help" | "version" | Shell | null,
};

/** A shell that `--completions` writes a script for. */
export type Shell = "bash" | "zsh" | "fish";

const SHELLS: readonly Shell[] = ["bash", "zsh", "fish"];

/** What the command line asks for. */
export type Options = Readonly<typeof DEFAULTS>;

/** Whether a run is for its times. */
function isSeries(options: Options): boolean {
  return options.marks.length * options.count > 1;
}

/** The help of an option, and how its value is stored; `given` is the option as it was written. */
type Option = readonly [help: string, store: Store];
type Store = (o: { -readonly [K in keyof Options]: Options[K] }, v: string, given: string) => void;

const OPTIONS: Record<string, Record<string, Option>> = {
  "The mark": {
    "-d, --dscp NAME[,NAME…]": [
      "EF (the default), VA or VOICE-ADMIT, LE, DF or BE, CS0 to CS7, AF11 to AF43, or a number from 0 to 63; several are used in rotation; all means all 64",
      (o, v) => o.marks = [...o.marks === DEFAULTS.marks ? [] : o.marks, ...parseMarks(v)],
    ],
    "    --tos BYTE": [
      "the whole ToS byte or Traffic Class, such as 184 or 0xB8; its two ECN bits must be 0",
      (o, v) => o.marks = [parseByte(v)],
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
      (o, v, given) => o.connectTimeout = parseSeconds(given, v),
    ],
    "-m, --max-time S": [
      "time limit for each request in seconds, and for the path of --trace (default 30; 0: none)",
      (o, v, given) => o.maxTime = parseSeconds(given, v),
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
    "    --json": ["one JSON object instead of body and report", (o) => o.json = true],
    "    --completions SHELL": [
      "completion script for bash, zsh or fish, for an installed dscp-get",
      (o, v) => o.print ??= parseShell(v),
    ],
    "-V, --version": ["the version", (o) => o.print ??= "version"],
    "-h, --help": ["this text", (o) => o.print ??= "help"],
  },
  "Did the network care?": {
    "-n, --count N": [
      "N rounds of requests, one after the other, and a table of their times",
      (o, v, given) => o.count = parseWhole(given, v, 1_000_000),
    ],
    "    --interval S": [
      "seconds between requests (default 0)",
      (o, v, given) => o.interval = parseSeconds(given, v),
    ],
  },
  "Where is the mark changed?": {
    "    --trace": [
      "what each router on the path received, hop by hop, and between which two the mark is changed; exact on IPv6, on IPv4 only as root",
      (o) => o.trace = true,
    ],
    "    --max-hops N": [
      "the most hops to try, 1 to 64 (default 30)",
      (o, v, given) => o.maxHops = parseWhole(given, v, MAX_HOPS),
    ],
  },
  "The far end": {
    "    --serve [HOST:]PORT": [
      `answer GET and HEAD with the marks that arrived, until Ctrl-C; HOST is ${DEFAULT_HOST} unless given, '[::]' for all`,
      (o, v) => o.serve = parseListen(v),
    ],
  },
};

/** The options one by one: `--name` is the last of the flags; a switch has `""` for a value. */
function optionRows(): { flags: string[]; value: string; help: string; store: Store }[] {
  return Object.values(OPTIONS).flatMap(Object.entries<Option>).map(([label, [help, store]]) => {
    const [, short, long, value] = /^(-.)?[ ,]*(--[\w-]+) ?(.*)$/.exec(label)!;
    const flags = short === undefined ? [long] : [short, long];
    return { flags, value, help, store };
  });
}

/** How this program was started: by a URL, from a checkout, or as an installed command. */
function commandLine(): string {
  const run = "deno run --allow-net --allow-ffi";
  if (!import.meta.url.startsWith("file:")) return `${run} ${printable(import.meta.url)}`;
  try {
    // The package's own name resolves if its deno.json is in use; an installed command has another.
    import.meta.resolve("@dscp-get/dscp-get");
    return `${run} main.ts`;
  } catch {
    return "dscp-get";
  }
}

/** The text of `--help`, in lines of at most `width` columns. */
function usage(width: number): string {
  const indent = " ".repeat(width < 72 ? 8 : 26);
  const filled = (text: string) =>
    wrapped(text, width - indent.length).replace(/^/gm, indent).trimEnd();
  const groups = Object.entries(OPTIONS).map(([title, options]) => {
    const rows = Object.entries(options).map(([label, [help]]) => {
      const start = `  ${label}`.padEnd(indent.length);
      const isAlone = start.length > indent.length;
      return `${start}${isAlone ? "\n" + filled(help) : filled(help).slice(indent.length)}\n`;
    });
    return `${title}\n${rows.join("")}`;
  });
  const paragraphs = [
    `dscp-get ${VERSION}: send one HTTP GET whose packets carry a DSCP mark, and prove it`,
    `\xa0\xa0${commandLine()} [options] [URL]`,
    `Without a URL it asks http://${DEFAULT_HOST}:${DEFAULT_PORT}/, and answers the request itself if \
nothing is listening there. The reply's body goes to standard output, the report to standard error.`,
  ];
  const codes =
    `Exit codes: 0 done, 2 bad usage; as curl: 3 bad URL, 6 host not found, 7 cannot connect or listen, \
8 bad reply, 18 ended early, 22 HTTP error with -f, 23 cannot write, 28 timeout, 35 TLS failed, \
52 empty reply, 56 connection lost, 60 bad certificate, 77 bad --cacert file; \
100 the kernel did not accept the mark, 101 packets left with another mark, 102 packets arrived with \
another mark, at the server or at a router, 103 cannot run here (not Linux, or a permission or libc \
missing), 104 not proved with --require-proof.`;
  const intro = paragraphs.map((text) => `${wrapped(text, width)}\n`).join("")
    .replaceAll("\xa0", " ");
  return `${intro}${groups.join("\n")}\n${wrapped(codes, width)}`;
}

function parseShell(text: string): Shell {
  const shell = SHELLS.find((name) => name === text);
  if (shell !== undefined) return shell;
  throw usageError(`--completions takes bash, zsh or fish, not ${quote(text)}`);
}

/** The completion script of a shell, from the table of options. */
function completions(shell: Shell): string {
  const names = Array.from({ length: 64 }, (_, dscp) => markOf(dscp << 2).name);
  const marks = ["EF", ...names.filter((name) => name !== null && name !== "EF"), "all"];
  const quoted = (text: string) => `'${text.replaceAll("'", "'\\''")}'`;
  const options = optionRows().map((row) => {
    const words = row.value === "SHELL" ? SHELLS : row.value.startsWith("NAME") ? marks : [];
    return { ...row, words: words.join(" ") };
  });
  if (shell === "fish") {
    return options.reduce((script, { flags, value, help, words }) => {
      const names = flags.map((flag) => flag.replace("--", "-l ").replace(/^-(?=.$)/, "-s "));
      const list = value.includes(",") ? `(__fish_append , ${words})` : words;
      const values = value === "" ? "" : value === "FILE" ? "-r -F" : `-x -a ${quoted(list)}`;
      return `${script}complete -c dscp-get ${names.join(" ")} ${values} -d ${quoted(help)}\n`;
    }, "complete -c dscp-get -f\n");
  }
  if (shell === "zsh") {
    const escaped = (text: string) => text.replace(/[[\]:]/g, "\\$&");
    const specs = options.flatMap(({ flags, value, help, words }) => {
      const list = value.includes(",") ? `_sequence compadd - ${words}` : `(${words})`;
      const values = value && `:${escaped(value)}:${value === "FILE" ? "_files" : words && list}`;
      const end = (flag: string) => value && (flag.length > 2 ? "=" : "+");
      return flags.map((flag) => quoted(`*${flag}${end(flag)}[${escaped(help)}]${values}`));
    });
    return `#compdef dscp-get
_dscp-get() { _arguments -s -S ${specs.join(" \\\n  ")} '*:URL:_urls'; }
if [[ $funcstack[1] == _dscp-get ]]; then _dscp-get "$@"; else compdef _dscp-get dscp-get; fi\n`;
  }
  const cases = options.filter(({ value }) => value !== "").map(({ flags, value, words }) => {
    const list = `COMPREPLY=($(compgen -P "\${cur%"$last"}" -W '${words}' -- "$last"))`;
    const action = value === "FILE" ? "compopt -o default" : words && list;
    return `    ${flags.join("|")}) ${action} ;;\n`;
  });
  return `_dscp_get() {
  local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD-1]}
  # --dscp=EF comes as three words.
  if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=\${COMP_WORDS[COMP_CWORD-2]}; fi
  local last=\${cur##*,} options='${options.flatMap(({ flags }) => flags).join(" ")}'
  case $prev in
${cases.join("")}    *) [[ $cur != -* ]] || COMPREPLY=($(compgen -W "$options" -- "$cur")) ;;
  esac
}
complete -F _dscp_get dscp-get
`;
}

// ─── Arguments ──────────────────────────────────────────────────────────────────────────────────

/** Reads the command line. @throws {Failure} bad usage, exit 2 */
export function parseArguments(args: readonly string[]): Options {
  const options = { ...DEFAULTS }, urls: string[] = [], given = new Set<string>();
  const words = [...args];
  for (let word; (word = words.shift()) !== undefined;) {
    if (word === "--") urls.push(...words.splice(0));
    else if (!/^-./.test(word)) urls.push(word);
    else {
      // --name, --name=value, or letters of which the last may have its value right behind it
      const isLong = word.startsWith("--");
      const [, as, rest] = (isLong ? /^(--[^=]*)(?:=([^]*))?$/ : /^(-.)([^]+)?$/u).exec(word)!;
      const option = optionRows().find(({ flags }) => flags.includes(as));
      if (option === undefined) throw unknownOption(as);
      const { flags, value: valueName, store } = option, hasValue = valueName !== "";
      // The letters behind a switch are options too, and "-" is none.
      if (!isLong && !hasValue && rest?.startsWith("-")) throw unknownOption(word);
      if (isLong && !hasValue && rest !== undefined) throw usageError(`${as} takes no value`);
      if (!isLong && !hasValue && rest !== undefined) words.unshift(`-${rest}`);
      const value = hasValue ? rest ?? words.shift() : "";
      if (value === undefined) throw usageError(`${as} needs a value`);
      store(options, value, as);
      given.add(flags.at(-1)!);
    }
  }
  if (urls.length > 1) {
    throw usageError(`one URL at a time, not ${urls.length}: ${urls.map(quote).join(" ")}`);
  }
  if (given.size > 0 && options.print === null) checkTogether(options, given, urls);
  if (options.trace && !given.has("--connect-timeout")) {
    const isShorter = given.has("--max-time") && options.maxTime > 0;
    options.connectTimeout = isShorter ? Math.min(options.maxTime, TRACE_TIMEOUT) : TRACE_TIMEOUT;
  }
  return { ...options, url: urls[0] ?? null };
}

/** @throws {Failure} options that exclude each other, or that do nothing beside others */
function checkTogether(options: Options, given: Set<string>, urls: readonly string[]): void {
  if (given.has("--dscp") && given.has("--tos")) {
    throw usageError("--dscp and --tos are mutually exclusive: give one of them");
  }
  if (options.serve !== null && urls.length > 0) {
    throw usageError("--serve takes no URL: it is the far end");
  }
  const beside = [...given].find((name) => !["--serve", "--silent", "--show-error"].includes(name));
  if (options.serve !== null && beside !== undefined) {
    throw usageError(`${beside} cannot be combined with --serve: it is for requests`);
  }
  const isMany = !options.trace && (isSeries(options) || given.has("--count"));
  const isShown = !options.trace && !isSeries(options) && !options.json;
  const useless = {
    ...!options.trace && { "--max-hops": "it is for --trace" },
    ...!isMany && { "--interval": "it is for series" },
    ...!isShown && { "--include": "no reply is printed in a series, a trace or JSON" },
  };
  for (const [name, why] of Object.entries(useless)) {
    if (given.has(name)) throw usageError(`${name} does nothing here: ${why}`);
  }
  if (options.trace && given.has("--count")) {
    throw usageError(
      "--trace and --count are mutually exclusive: a trace is one request for each mark",
    );
  }
}

function usageError(message: string, hint = "--help lists the options"): Failure {
  return new Failure(Exit.usage, printable(message), hint);
}

function unknownOption(given: string): Failure {
  const message = `unknown option ${quote(given)}`;
  if (/^--(allow|deny|unstable|no-prompt|no-check|quiet|reload|config|cert|v8-flags)/.test(given)) {
    return usageError(message, "options of Deno go before main.ts: deno run --allow-net …");
  }
  const near = optionRows().map(({ flags }) => flags.at(-1)!)
    .map((name) => ({ name, distance: distance(given, name) }))
    .sort((a, b) => a.distance - b.distance)[0];
  const isNear = given.startsWith("--") && near.distance <= Math.min(3, near.name.length / 3);
  return usageError(message, isNear ? `did you mean ${near.name}?` : undefined);
}

/** How many letters to add, drop or change to make one word of another (Levenshtein). */
function distance(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, at) => at);
  for (let i = 1; i <= from.length; i++) {
    const next = [i];
    for (let j = 1; j <= to.length; j++) {
      const change = row[j - 1] + (from[i - 1] === to[j - 1] ? 0 : 1);
      next.push(Math.min(row[j] + 1, next[j - 1] + 1, change));
    }
    row = next;
  }
  return row[to.length];
}

function orUsage<T>(parse: () => T, hint?: string): T {
  try {
    return parse();
  } catch (error) {
    throw error instanceof RangeError ? usageError(error.message, hint) : error;
  }
}

function parseMarks(text: string): Mark[] {
  return text.split(",").flatMap((word) => {
    const name = word.trim();
    if (name.toLowerCase() === "all") return Array.from({ length: 64 }, (_, n) => markOf(n << 2));
    const isByte = /^\d+$/.test(name) && Number(name) > 63 && Number(name) < 256;
    const hint = isByte ? `did you mean the whole byte? --tos ${name}` : undefined;
    return [orUsage(() => parseDscp(name), hint)];
  });
}

function parseByte(text: string): Mark {
  const isHex = /^[0-9a-f]{2}$/i.test(text);
  return orUsage(
    () => parseTos(text),
    isHex ? `did you mean hexadecimal? --tos 0x${text}` : undefined,
  );
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
  const parts = /^(?:(?:\[([^\]]+)\]|([^:]+)):)?(\d{1,5})$/.exec(text);
  if (parts === null || Number(parts[3]) > 65535) {
    const forms = "PORT, HOST:PORT or [IPv6]:PORT, PORT from 0 to 65535";
    throw usageError(`--serve takes ${forms}, not ${quote(text)}`);
  }
  const hostname = parts[1]?.replace(/%25(?=.)/, "%") ?? parts[2] ?? DEFAULT_HOST;
  return { hostname, port: Number(parts[3]) };
}

/** Reads a header in the forms of curl's `-H`. */
function parseHeader(text: string): Header {
  const [, name, separator, rest] = /^([^:;]*)([:;]?)([^]*)$/.exec(text)!;
  checkHeader(name, rest, text);
  const value = rest.trim();
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
  if (/[\r\n\0]/.test(value)) {
    throw usageError(`${quote(text)} is not a header: it must not contain CR, LF or NUL`);
  }
}

/** How the command line wants its requests made. @throws {Failure} 77 or 103, about `--cacert` */
async function askOptionsOf(options: Options): Promise<AskOptions> {
  const { cacert, insecure } = options;
  const caCerts = cacert === null ? [] : await readCertificates(cacert);
  return { ...options, trust: cacert !== null || insecure ? { caCerts, insecure } : null };
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
    throw new Failure(Exit.badCaFile, `cannot read ${quote(file)}: ${reason(error as Error)}`);
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

// ─── Target ─────────────────────────────────────────────────────────────────────────────────────

/** Where a request goes. */
export interface Target {
  /** The URL as it is asked for, without fragment and zone. */
  readonly url: string;
  /** Whether it is https. */
  readonly isHttps: boolean;
  /** Host name or address, without brackets, with its zone: `fe80::1%eth0`. */
  readonly host: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The Host header's value (RFC 9110 section 7.2). */
  readonly authority: string;
  /** Path and query, percent-encoded. */
  readonly path: string;
}

function localTarget(host: string, port: number): Target {
  return parseTarget(formatAddress({ hostname: host, port }));
}

/** Reads a URL as curl does: without a scheme it is http. @throws {Failure} bad URL, exit 3 */
export function parseTarget(text: string): Target {
  const bad = (why: string) => new Failure(Exit.badUrl, `bad URL ${quote(text)}: ${why}`);
  // The URL parser would silently drop these.
  if ([...text].some((c) => c < " " || c === "\x7f")) {
    throw bad("control characters are not allowed");
  }
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(text)?.[1].toLowerCase();
  if (scheme !== undefined && scheme !== "http" && scheme !== "https") {
    throw bad(`the scheme must be http or https, not ${scheme}`);
  }
  const full = /^https?:(?!\d)/i.test(text) ? text : `http://${text}`;
  // The zone of a link-local address, RFC 6874, as curl reads it: the URL parser takes none.
  const zoned = /^(https?:\/\/\[[^%\]]*)(%(?:25(?!\]))?([\w.~-]{1,15}))\]/i.exec(full);
  const bare = zoned === null ? full : zoned[1] + full.slice(zoned[1].length + zoned[2].length);
  const url = /^https?:\/\/[^/?#]/i.test(bare) ? URL.parse(bare) : null;
  if (url === null) throw bad("it should look like http://host:port/path, IPv6 in brackets");
  if (url.username !== "" || url.password !== "") {
    throw new Failure(
      Exit.badUrl,
      "user and password in the URL are not supported",
      "send them yourself: -H 'Authorization: Basic …' with the base64 of user:password",
    );
  }
  const isHttps = url.protocol === "https:";
  const port = url.port === "" ? (isHttps ? 443 : 80) : Number(url.port);
  if (port === 0) throw bad("port 0 is not a valid destination");
  const host = url.hostname.replace(/^\[(.*)\]$/, "$1");
  if (host === url.hostname && /[^\w.~-]/.test(host)) throw bad(`${quote(host)} is no host name`);
  url.hash = "";
  // The parser's own `search` has no question mark if the query is empty.
  const path = url.href.slice(url.origin.length);
  const zone = zoned === null ? "" : `%${zoned[3]}`;
  return { url: url.href, isHttps, host: host + zone, port, authority: url.host, path };
}

// ─── Ask ────────────────────────────────────────────────────────────────────────────────────────

/** One request and what became of it. */
export interface Exchange {
  /** Where to. */
  readonly target: Target;
  /** The mark that is set. */
  readonly mark: Mark;
  /** When it began, on the clock of `performance.now()`. */
  readonly started: number;
  /** The connection; `null` if none was established. */
  connection: MarkedConn | null;
  /** The reply; `null` if no status line came. */
  reply: Reply | null;
  /** Milliseconds since it began; `null` for what was not reached. */
  readonly milliseconds: { connect: number | null; firstByte: number | null; total: number | null };
  /** What is known of the packets that left. */
  left: Left;
  /** What the far end reports; `null` if it reports nothing. */
  arrived: ArrivedReport | null;
  /** What went wrong; `null` if nothing did. */
  failure: Failure | null;
}

/** How far a request has come, which decides what an error means. */
type Stage = "listening" | "connecting" | "securing" | "connected";

/** What a request may be given besides where and how. */
interface AskContext {
  /** The limits of a series, which has one request after the other. */
  readonly limits?: Limits;
  /** When it began, and what opens its connection. */
  readonly started?: number;
  readonly open?: typeof connect;
  /** Gets the exchange as it begins, to look at while it is under way. */
  readonly watch?: (exchange: Exchange) => void;
}

/**
 * Connects, marks, asks, reads, proves and closes. Does not throw for what happens to the request:
 * that is the exchange's `failure`.
 */
async function ask(
  target: Target,
  mark: Mark,
  options: AskOptions,
  sink: Sink,
  { limits = new Limits(options), started, open = connect, watch }: AskContext = {},
): Promise<Exchange> {
  const request = encodeRequest(target, options.headers);
  const to: ConnectOptions = {
    hostname: target.host,
    port: target.port,
    tos: mark.tos,
    markSyn: options.markSyn,
    family: options.family,
    trust: target.isHttps ? options.trust : null,
    requestSize: request.length,
  };
  await prepareConnect(to, target.isHttps);
  const exchange: Exchange = {
    target,
    mark,
    started: started ?? performance.now(),
    connection: null,
    reply: null,
    milliseconds: { connect: null, firstByte: null, total: null },
    left: NOT_OBSERVED,
    arrived: null,
    failure: null,
  };
  watch?.(exchange);
  const { milliseconds } = exchange;
  const signal = limits.begin(target);
  let conn: MarkedConn | null = null, stage: Stage = "connecting", writeError: unknown = null;
  signal.addEventListener("abort", () => conn?.close());
  try {
    conn = await open(to, signal);
    conn.setTos(mark.tos);
    exchange.connection = conn;
    signal.throwIfAborted();
    milliseconds.connect = performance.now() - exchange.started;
    stage = "securing";
    if (target.isHttps) await conn.startTls(target.host.replace(/%.*/, ""), to.trust);
    stage = "connected";
    limits.connected();
    // A server may reply before it has read a large request, and what it has sent can still be
    // read after our write has failed, but over node:tls.
    conn.write(request).catch((error) => {
      writeError = error;
      if (!isLost(error)) conn?.close();
    });
    await readReply(conn, exchange, sink, signal);
    // A connection that was closed on timeout can look like a normal end of the reply.
    signal.throwIfAborted();
  } catch (error) {
    if (error instanceof SinkError) throw error.cause;
    const cause = error instanceof Failure ? error : writeError ?? error;
    exchange.failure = signal.aborted
      ? signal.reason
      : failureOf(cause, stage, { ...to, ...target });
  } finally {
    milliseconds.total = performance.now() - exchange.started;
    limits.end();
    conn?.close();
  }
  if (exchange.connection !== null) exchange.left = judgeLeft(exchange.connection, mark);
  exchange.arrived = judgeArrived(exchange);
  exchange.failure = verdictOf(exchange, options);
  return exchange;
}

/**
 * Opens a connection and finds its descriptor; it is not marked yet, but for a SYN that is to be.
 *
 * @param signal abandons the attempt when it aborts
 */
async function connect(options: ConnectOptions, signal: AbortSignal): Promise<MarkedConn> {
  const { hostname, port, tos, markSyn, family } = options;
  if (!needsOwnSocket(options)) {
    return MarkedConn.adopt(await Deno.connect({ hostname, port, signal }), options);
  }
  const { dial } = await import("./ffi/dial.ts");
  const conn = await dial({ hostname, port, tos: markSyn ? tos : null, family, signal });
  return MarkedConn.adopt(conn, options);
}

/** Whether the other end has gone: what it has sent can still be read. */
function isLost(error: unknown): boolean {
  const { BrokenPipe, ConnectionReset, ConnectionAborted } = Deno.errors;
  return [BrokenPipe, ConnectionReset, ConnectionAborted].some((lost) => error instanceof lost);
}

/** The bytes of the GET. */
export function encodeRequest(target: Target, headers: readonly Header[]): Uint8Array<ArrayBuffer> {
  const nameOf = ([name]: Header) => name.toLowerCase();
  const given = new Set(headers.map(nameOf));
  const standard: Header[] = [
    ["Host", target.authority],
    ["User-Agent", `dscp-get/${VERSION}`],
    ["Accept", "*/*"],
    ["Connection", "close"],
  ];
  const own = headers.filter(([, value]) => value !== null);
  // A request has one Host (RFC 9112 section 3.2): the first that is given, as curl's.
  const host = own.find((header) => nameOf(header) === "host");
  const lines = [
    ...standard.filter((header) => !given.has(nameOf(header))),
    ...own.filter((header) => nameOf(header) !== "host" || header === host),
  ].map(([name, value]) => `${name}: ${value}\r\n`);
  return new TextEncoder().encode(`GET ${target.path} HTTP/1.1\r\n${lines.join("")}\r\n`);
}

/** The time limits of requests, one after the other. */
class Limits {
  #abort: AbortController | null = null;
  #target: Target | null = null;
  /** When the request that is under way must be over, and be connected. */
  #endsAt = Infinity;
  #connectsBy = Infinity;
  /** Rings at `#ringsAt` for whatever is due then: one for each request would keep 0.6 KiB. */
  #alarm: AbortSignal | null = null;
  #ringsAt = Infinity;
  /** Why all requests end, once somebody has stopped them. */
  stopped: Failure | null = null;

  constructor(private readonly options: Pick<AskOptions, "connectTimeout" | "maxTime">) {}

  /** Begins a request. @returns aborts, with a {@linkcode Failure}, when its time is over */
  begin(target: Target): AbortSignal {
    const { maxTime, connectTimeout } = this.options, now = performance.now();
    this.#abort = new AbortController();
    this.#target = target;
    this.#endsAt = maxTime > 0 ? now + maxTime * 1000 : Infinity;
    this.#connectsBy = connectTimeout > 0 ? now + connectTimeout * 1000 : Infinity;
    this.#watch();
    return this.stopped === null ? this.#abort.signal : AbortSignal.abort(this.stopped);
  }

  /** Lifts the limit on connecting. */
  connected(): void {
    this.#connectsBy = Infinity;
  }

  /** Lifts both limits. */
  end(): void {
    this.#endsAt = this.#connectsBy = Infinity;
    // Releases the request's memory; without a listener the alarm keeps no process alive.
    this.#alarm?.removeEventListener("abort", this.#ring);
    this.#abort = null;
  }

  #watch(): void {
    const due = Math.min(this.#endsAt, this.#connectsBy);
    if (due === Infinity) return;
    if (this.#alarm === null || this.#alarm.aborted || due < this.#ringsAt) {
      this.#alarm?.removeEventListener("abort", this.#ring);
      this.#alarm = AbortSignal.timeout(Math.max(0, due - performance.now()));
      this.#ringsAt = due;
    }
    this.#alarm.addEventListener("abort", this.#ring);
  }

  readonly #ring = (): void => {
    const now = performance.now(), isOver = now >= this.#endsAt;
    if (!isOver && now < this.#connectsBy) return this.#watch();
    const { host, port, isHttps } = this.#target!;
    const [doing, seconds] = isOver
      ? ["the request", this.options.maxTime]
      : ["connecting", this.options.connectTimeout];
    const handshake = !isOver && isHttps ? ", TLS's handshake included," : "";
    const message = `${doing} to ${formatAddress({ hostname: host, port })}${handshake} ` +
      `took longer than ${plural(seconds, "second")}`;
    this.#end(new Failure(Exit.timeout, message));
  };

  /** Ends the request that is under way, and all that follow. */
  stop(failure: Failure): void {
    this.stopped = failure;
    this.#end(failure);
  }

  #end(failure: Failure): void {
    const abort = this.#abort;
    this.end();
    abort?.abort(failure);
  }
}

/** Whatever was thrown, as a failure that a person can read: the one place that translates errors. */
function failureOf(error: unknown, stage: Stage | null = null, to?: Where): Failure {
  if (error instanceof Failure) return error;
  if (!(error instanceof Error)) return new Failure(Exit.cannotRun, printable(String(error)));
  if (error instanceof CannotRunError) {
    const hint = isGranted({ name: "ffi" })
      ? undefined
      : "run with --allow-ffi, not --allow-ffi=FILE";
    return new Failure(Exit.cannotRun, error.message, hint);
  }
  if (error instanceof Deno.errors.NotCapable) {
    const hint = "run with --allow-net --allow-ffi";
    return missingPermission(to) ?? new Failure(Exit.cannotRun, reason(error).split(",")[0], hint);
  }
  if (error instanceof DescriptorError && error.lost) {
    return new Failure(Exit.connectionLost, error.message);
  }
  const markErrors = [LibcError, MarkError, DescriptorError];
  if (stage === "connecting" && markErrors.some((type) => error instanceof type)) {
    return new Failure(Exit.notMarked, `the kernel did not accept the mark: ${error.message}`);
  }
  if (stage === "listening") {
    const message = `cannot listen on ${printable(formatAddress(to!))}: ${reason(error)}`;
    return new Failure(Exit.cannotConnect, message);
  }
  if (stage === "connecting") return connectFailure(error, to!);
  if (stage === "securing") return tlsFailure(error);
  if (stage === null) return new Failure(Exit.cannotRun, printable(error.message));
  return new Failure(Exit.connectionLost, `the connection was lost: ${reason(error)}`);
}

/** Where a request was to go, and whether it was https. */
type Where =
  & Pick<ConnectOptions, "hostname" | "port">
  & Partial<ConnectOptions>
  & { readonly isHttps?: boolean };

function connectFailure(
  error: Error,
  { hostname, port, family = null, isHttps }: Where,
): Failure {
  const where = formatAddress({ hostname, port });
  const isUnknown = error.message.startsWith("failed to lookup address information");
  // A zone that does not exist is 7, as curl has it.
  if ((isUnknown && !hostname.includes("%")) || error instanceof URIError) {
    const why = family === null ? "not found" : `has no IPv${family} address`;
    // As with curl, an address of the other family is a host that was found.
    const isAddress = /^[\d.]+$|:/.test(hostname);
    const code = isAddress ? Exit.cannotConnect : Exit.hostNotFound;
    return new Failure(code, `host ${quote(hostname)} ${why}`);
  }
  if (error instanceof Deno.errors.TimedOut) {
    return new Failure(Exit.timeout, `no answer from ${where}`);
  }
  const isHere = /^127\.|^::1$|(^|\.)localhost\.?$/.test(hostname);
  const isRefused = error instanceof Deno.errors.ConnectionRefused;
  const ways = family === 6 || hostname.includes(":")
    ? `--serve '[::1]:${port}', or python3 -m http.server -b ::1 ${port}`
    : `--serve ${port}, or python3 -m http.server ${port}`;
  const hint = isHere && isRefused && !isHttps
    ? `to start a server there: this script with ${ways}`
    : undefined;
  return new Failure(Exit.cannotConnect, `cannot connect to ${where}: ${reason(error)}`, hint);
}

/** Words for the certificate errors of Deno's two TLS libraries; a time in them becomes a date. */
const CERTIFICATE_ERRORS: readonly (readonly [said: RegExp, words: string])[] = [
  [/CaUsedAsEndEntity/, "it is a CA certificate, not a server's (self-signed)"],
  [/^self-signed certificate$/, "it is self-signed"],
  [/UnknownIssuer|in certificate chain/, "its issuer is not trusted"],
  [/^unable to verify/, "its issuer is not trusted, or it is not valid today"],
  [/NotValidForName|not valid for name|altnames/, "it is for another host name"],
  [/not valid after (\d+)/, "it was valid until"],
  [/not valid before (\d+)/, "it will be valid from"],
  [/^Expired/, "it has expired"],
  [/^NotValidYet/, "it is not valid yet"],
];

function tlsFailure(error: Error): Failure {
  const message = reason(error);
  const bare = message.replace(/^invalid peer certificate: /, "");
  const [said, words] = CERTIFICATE_ERRORS.find(([said]) => said.test(bare)) ?? [/$/, bare];
  const seconds = said.exec(bare)![1];
  const date = seconds && new Date(Number(seconds) * 1000).toISOString().slice(0, 10);
  const why = date === undefined ? words : `${words} ${date}`;
  if (bare === message) {
    const isPlain = /InvalidContentType|wrong version number|packet length too long/.test(message);
    const hint = isPlain ? "the server does not speak TLS: is it http://?" : undefined;
    return new Failure(Exit.tlsFailed, `TLS failed: ${message}`, hint);
  }
  const isUntrusted = /issuer|signed/.test(words);
  return new Failure(
    Exit.badCertificate,
    `the server's certificate is not valid: ${why}`,
    isUntrusted
      ? "--cacert FILE trusts the certificates in FILE, -k any"
      : "-k accepts any certificate",
  );
}

/** Which permission is missing, if one is; `to` is where that for the network has to lead. */
function missingPermission(to?: Where): Failure | null {
  const where = to && formatAddress(to);
  if (where !== undefined && netPermission(where) !== "granted") {
    const hint = `run with --allow-net or --allow-net=${printable(where)}`;
    return new Failure(Exit.cannotRun, `no permission to use ${printable(where)}`, hint);
  }
  if (isGranted({ name: "ffi" })) return null;
  const message = "no permission to call libc, which sets the mark";
  return new Failure(Exit.cannotRun, message, "run with --allow-ffi");
}

function isGranted(permission: Deno.PermissionDescriptor): boolean {
  return Deno.permissions.querySync(permission).state === "granted";
}

/** How {@linkcode get} makes its request. */
export interface GetOptions extends Partial<AskOptions> {
  /** The mark: a name such as `"EF"` (the default), or a number from 0 to 63. */
  readonly dscp?: string | number;
}

/**
 * The options of a program with the defaults for those left out.
 *
 * @throws {Failure | RangeError} a bad header, or no time limit
 */
function complete<T extends GetOptions>(defaults: T, options: { [K in keyof T]?: unknown }): T {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const all: T = { ...defaults, ...Object.fromEntries(given) };
  for (const [name, value] of all.headers ?? []) checkHeader(name, value ?? "");
  for (const limit of [all.connectTimeout, all.maxTime]) {
    if (limit === undefined || (limit >= 0 && limit <= MAX_SECONDS)) continue;
    throw new RangeError(`${limit} is no time limit; allowed are 0 to ${MAX_SECONDS} seconds`);
  }
  return all;
}

/**
 * One marked GET, for other programs.
 *
 * ```ts
 * import { get } from "./main.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
 * const { left } = await get(`http://127.0.0.1:${server.addr.port}/`, { dscp: "AF41" });
 * console.log(left.proved, left.packets[0].tos); // true 136
 * await server.shutdown();
 * ```
 *
 * @param sink where the reply goes; without one it is read and thrown away
 * @throws {Failure} whatever went wrong, with its exit code and the exchange as far as it came
 * @throws {RangeError} not a DSCP, or not a time limit
 * @throws whatever the sink throws
 */
export async function get(
  url: string | URL,
  options: GetOptions = {},
  sink: Sink = {},
): Promise<Exchange> {
  const { dscp, ...askOptions } = complete({ ...ASK_DEFAULTS, dscp: "EF" }, options);
  const exchange = await ask(parseTarget(String(url)), parseDscp(String(dscp)), askOptions, sink);
  if (exchange.failure === null) return exchange;
  exchange.failure.exchange = exchange;
  throw exchange.failure;
}

// ─── Reply ──────────────────────────────────────────────────────────────────────────────────────

/** A header or trailer of a reply. */
export type Field = [name: string, value: string];

/** A reply as far as it was read. */
export interface Reply {
  /** The status code, 200 to 999. */
  status: number;
  /** The reason phrase, a character a byte. */
  reason: string;
  /** Names in small letters, values a character a byte, in the order they came. */
  headers: Field[];
  /** The fields behind the last chunk, likewise. */
  trailers: Field[];
  /**
   * The Traffic Class of the latest packet when its first bytes were read; `null` on IPv4, where the
   * kernel reports none.
   */
  tos: number | null;
  /** Bytes of the body that were read, without the framing of chunks. */
  bodyBytes: number;
  /** Whether the whole body was read. */
  complete: boolean;
}

/** Where the bytes of a reply go; every method may be left out. */
export interface Sink {
  /** Gets status line or header with its line end, as it came, a character a byte. */
  head?(line: string): void | Promise<void>;
  /** Gets the reply so far, before its body; may throw to stop. */
  begin?(reply: Reply): void;
  /** Gets a piece of the body, which is reused once the call has returned or its promise has settled. */
  body?(piece: Uint8Array): void | Promise<void>;
}

/** What a sink has thrown is its `cause`: an error of the program's own, not of the request. */
export class SinkError extends Error {
  /** An error of a sink. */
  constructor(cause: unknown) {
    super("the sink failed", { cause });
    this.name = "SinkError";
  }
}

type Pass = (piece: Uint8Array) => Promise<void>;
type PassLine = (line: string) => Promise<void>;

const TAB = 0x09, LF = 0x0a, CR = 0x0d, SPACE = 0x20, SEMICOLON = 0x3b;
const MAX_INTERIM = 100, HEAD_LIMIT = 256 * 1024;
// A small reply takes no more memory than it needs; large pieces cost less for each byte.
const FIRST_READ = 4 * 1024;

/** What has come on a connection and was not used yet. */
class Reader {
  buffer = new Uint8Array(FIRST_READ);
  /** Where the unused bytes begin and end. */
  from = 0;
  to = 0;
  /** There is no LF before this offset. */
  #searched = 0;
  #reads = 0;
  #turned = performance.now();

  constructor(
    private readonly source: Pick<MarkedConn, "read">,
    private readonly signal?: AbortSignal,
  ) {}

  /** Reads more behind what is here. @returns false at the end @throws {Failure} no room for more */
  async fill(): Promise<boolean> {
    this.signal?.throwIfAborted();
    // If data is always ready, timers and signals never get their turn.
    if (++this.#reads % 16 === 0 && performance.now() - this.#turned > 50) {
      await pause(0);
      this.#turned = performance.now();
    }
    if (this.to === this.buffer.length) this.#makeRoom();
    else if (this.from === this.to) this.from = this.to = this.#searched = 0;
    const size = await this.source.read(this.buffer.subarray(this.to));
    this.to += size ?? 0;
    return size !== null && size > 0;
  }

  // Only when the buffer is full; otherwise each read of a single byte would move all of it.
  #makeRoom(): void {
    const unused = this.buffer.subarray(this.from, this.to);
    if (unused.length === HEAD_LIMIT) throw badReply("a line is longer than 256 KiB");
    const size = Math.min(16 * this.buffer.length, HEAD_LIMIT);
    if (size > this.buffer.length) this.buffer = new Uint8Array(size);
    this.buffer.set(unused);
    this.#searched = Math.max(0, this.#searched - this.from);
    this.from = 0;
    this.to = unused.length;
  }

  /** How long the next line is, its end included; 0 if not all of it is here. */
  lineLength(): number {
    const { buffer, to } = this;
    let at = Math.max(this.from, this.#searched);
    while (at < to && buffer[at] !== LF) at++;
    this.#searched = at;
    return at < to ? at + 1 - this.from : 0;
  }

  /** The next line with its end, a character a byte; `null` if not all of it is here. */
  line(): string | null {
    const length = this.lineLength();
    return length === 0 ? null : latin1(this.take(length));
  }

  /** At most `max` of the bytes that are here, valid until the next call. */
  take(max: number): Uint8Array {
    const piece = this.buffer.subarray(this.from, Math.min(this.to, this.from + max));
    this.from += piece.length;
    return piece;
  }
}

function badReply(message: string): Failure {
  return new Failure(Exit.badReply, `malformed reply: ${message}`);
}

function endedEarly(message: string): Failure {
  return new Failure(Exit.endedEarly, `the reply ended early: ${message}`);
}

/**
 * Reads one reply, RFC 9112 sections 4 to 7, and passes its body on as it comes.
 *
 * @param exchange its `reply` is filled as it comes, so that a failed one is known as far as it came
 * @param signal ends the reading, also while the sink waits
 * @throws {Failure} malformed (8), ended early (18), empty (52)
 * @throws {SinkError} what the sink throws, unless that is a {@linkcode Failure}
 */
export async function readReply(
  source: Pick<MarkedConn, "read" | "arrivedTos">,
  exchange: Pick<Exchange, "reply" | "milliseconds" | "started">,
  sink: Sink,
  signal?: AbortSignal,
): Promise<void> {
  const reader = new Reader(source, signal);
  if (!await reader.fill()) {
    const message = "empty reply: the server closed the connection without a byte";
    throw new Failure(Exit.emptyReply, message);
  }
  exchange.milliseconds.firstByte = performance.now() - exchange.started;
  const { arrivedTos: tos } = source;
  let stop: (reason: unknown) => void = () => {};
  signal?.addEventListener("abort", () => stop(signal.reason));
  const pass = async (give: () => void | Promise<void>) => {
    try {
      const passing = give();
      if (passing === undefined) return;
      signal?.throwIfAborted();
      // Not Promise.race, which would keep something of every piece until the end of the reply.
      await new Promise<void>((resolve, reject) => {
        stop = reject;
        Promise.resolve(passing).then(resolve, reject);
      });
    } catch (error) {
      throw error instanceof Failure || signal?.aborted ? error : new SinkError(error);
    }
  };
  const passLine = (line: string) => pass(() => sink.head?.(line));
  const reply = await readHead(reader, tos, exchange, passLine);
  await pass(() => sink.begin?.(reply));
  const passPiece = (piece: Uint8Array) => {
    reply.bodyBytes += piece.length;
    return pass(() => sink.body?.(piece));
  };
  const framing = framingOf(reply);
  if (framing !== "chunked") await readLength(reader, framing, passPiece);
  else {
    await readChunks(reader, reply, passPiece);
    await readFields(reader, reply.trailers, "trailer", passLine);
  }
  reply.complete = true;
}

/** Status line and headers of the final reply; those of interim replies (1xx) only pass by. */
async function readHead(
  reader: Reader,
  tos: number | null,
  exchange: Pick<Exchange, "reply">,
  passLine: PassLine,
): Promise<Reply> {
  for (let interim = 0;; interim++) {
    if (interim > MAX_INTERIM) throw badReply(`more than ${MAX_INTERIM} interim replies`);
    let line;
    while ((line = reader.line()) === null) {
      // A peer that does not speak HTTP may never send an LF: look at its first bytes.
      const { buffer, from, to } = reader;
      const start = latin1(buffer.subarray(from, Math.min(to, from + 60)));
      const isHttp = /^HTTP\/1\.[01] /.test(start + "HTTP/1.1 ".slice(start.length));
      if (!isHttp) throw notHttp(start);
      if (!await reader.fill()) {
        const message = "empty reply: the connection ended before its status line";
        throw new Failure(Exit.emptyReply, message);
      }
    }
    const reply = statusOf(line, tos);
    if (reply.status >= 200) exchange.reply = reply;
    await passLine(line);
    await readFields(reader, reply.headers, "header", passLine);
    if (reply.status >= 200) return reply;
  }
}

function notHttp(line: string): Failure {
  // An alert or a handshake record, RFC 8446 section 5.1
  const isTls = line.startsWith("\x15\x03") || line.startsWith("\x16\x03");
  return new Failure(
    Exit.badReply,
    `malformed reply: it starts with ${quote(line.slice(0, 60))}, which is not HTTP/1.1`,
    isTls ? "the server speaks TLS: is it https://?" : undefined,
  );
}

function statusOf(line: string, tos: number | null): Reply {
  const text = lineText(line);
  // As lenient as curl, and as RFC 9112 section 4 allows: more than one space between the words.
  const parts = /^HTTP\/1\.[01] +(\d{3})(?![^ ])/.exec(text);
  if (parts === null) throw notHttp(text);
  const status = Number(parts[1]), reason = trimmed(text.slice(parts[0].length));
  if (reason.includes("\0")) throw badReply("the status line holds a NUL byte");
  if (status < 100) throw badReply(`status ${parts[1]}`);
  if (status === 101) throw badReply("101 switches to a protocol that was not asked for");
  return { status, reason, headers: [], trailers: [], tos, bodyBytes: 0, complete: false };
}

/** Header or trailer lines up to the blank one (RFC 9112 sections 5 and 7.1.2). */
async function readFields(
  reader: Reader,
  fields: Field[],
  what: "header" | "trailer",
  passLine: PassLine,
): Promise<void> {
  for (let budget = HEAD_LIMIT;;) {
    let line;
    while ((line = reader.line()) === null) {
      if (!await reader.fill()) throw endedEarly(`in the middle of the ${what}s`);
    }
    budget -= line.length;
    if (budget < 0) throw badReply(`the ${what}s are larger than 256 KiB`);
    const text = lineText(line);
    // As with curl, a header line that begins with CR is the blank one, whatever follows.
    const isBlank = text === "" || (what === "header" && line.startsWith("\r"));
    if (!isBlank) addField(fields, line, text, what);
    if (!isBlank || what === "header") await passLine(line);
    if (isBlank) return;
  }
}

/** @throws {Failure} the line holds no field, nor the rest of one */
function addField(fields: Field[], line: string, text: string, what: string): void {
  if (text.includes("\0")) throw badReply(`a ${what} holds a NUL byte`);
  if (what === "trailer" && /\r(?!\n)/.test(line)) throw badReply("a trailer holds a bare CR");
  const last = fields.at(-1);
  if (/^[ \t]/.test(line) && last !== undefined) {
    // obs-fold, RFC 9112 section 5.2
    const more = trimmed(text);
    if (more !== "") last[1] += last[1] === "" ? more : ` ${more}`;
    return;
  }
  const colon = text.indexOf(":");
  if (colon < 1) throw badReply(`${what} line ${quote(text.slice(0, 60))} has no name and colon`);
  fields.push([trimmed(text.slice(0, colon)).toLowerCase(), trimmed(text.slice(colon + 1))]);
}

/** A line without its end; a CR elsewhere counts as a space (RFC 9112 section 2.2). */
function lineText(line: string): string {
  return line.replace(/\r?\n$/, "").replaceAll("\r", " ");
}

// By hand: a regular expression takes quadratic time for a line of blanks with one other at its end.
function trimmed(text: string): string {
  let from = 0, to = text.length;
  while (from < to && " \t".includes(text[from])) from++;
  while (to > from && " \t".includes(text[to - 1])) to--;
  return text.slice(from, to);
}

/** Bytes as text, a character a byte. */
function latin1(bytes: Uint8Array): string {
  // As many at once as fit the stack.
  const max = 8192;
  if (bytes.length <= max) return String.fromCharCode.apply(null, bytes as unknown as number[]);
  let text = "";
  for (let at = 0; at < bytes.length; at += max) text += latin1(bytes.subarray(at, at + max));
  return text;
}

/** The values of a header, its lines and commas taken apart; `null` if it is not there. */
function listOf({ headers }: Reply, name: string): string[] | null {
  const values = headers.flatMap(([other, value]) => other === name ? value.split(",") : []);
  return values.length === 0 ? null : values.map(trimmed);
}

/** How long the body is (RFC 9112 section 6.3): bytes, in chunks, or `Infinity` until the close. */
function framingOf(reply: Reply): number | "chunked" {
  if (reply.status === 204 || reply.status === 304) return 0;
  const codings = listOf(reply, "transfer-encoding");
  if (codings !== null) {
    // "identity" of RFC 2616 is no coding at all.
    const named = codings.map((coding) => coding.toLowerCase())
      .filter((coding) => coding !== "" && coding !== "identity");
    if (named.length === 0) return Infinity;
    if (named.length === 1 && named[0] === "chunked") return "chunked";
    const names = quote(codings.join(", ").slice(0, 60));
    throw badReply(`Transfer-Encoding ${names} was not asked for`);
  }
  const lengths = listOf(reply, "content-length");
  if (lengths === null) return Infinity;
  const first = Number(lengths[0]);
  for (const length of lengths) {
    if (!/^\d+$/.test(length) || !Number.isSafeInteger(Number(length))) {
      throw badReply(`Content-Length ${quote(length.slice(0, 60))}`);
    }
    if (Number(length) !== first) {
      throw badReply(`conflicting Content-Length ${first} and ${Number(length)}`);
    }
  }
  return first;
}

async function readLength(reader: Reader, length: number, pass: Pass): Promise<void> {
  for (let missing = length; missing > 0;) {
    if (reader.from === reader.to && !await reader.fill()) {
      if (length === Infinity) return;
      throw endedEarly(`${missing} of ${plural(length, "byte")} are missing`);
    }
    const piece = reader.take(missing);
    missing -= piece.length;
    await pass(piece);
  }
}

/** RFC 9112 section 7.1; the data of all chunks that are here is moved together and passed on. */
async function readChunks(reader: Reader, reply: Reply, pass: Pass): Promise<void> {
  let size = 0, missing = 0, next: "size" | "data" | "end" | "trailers" = "size";
  for (;;) {
    const { buffer } = reader;
    let start = reader.from, end = start;
    try {
      while (next !== "trailers") {
        const at = reader.from, here = reader.to - at;
        if (next === "data") {
          const count = Math.min(missing, here);
          if (count === 0) break;
          if (end === start) start = end = at;
          if (end !== at) buffer.copyWithin(end, at, at + count);
          end += count;
          reader.from += count;
          missing -= count;
          if (missing === 0) next = "end";
        } else if (next === "end") {
          const length = buffer[at] === CR ? 2 : 1;
          if (here < length) break;
          if (buffer[at + length - 1] !== LF) throw badReply("a chunk is longer than its size");
          reader.from += length;
          next = "size";
        } else {
          const length = reader.lineLength();
          if (length === 0) break;
          size = missing = chunkSize(buffer, at);
          reader.from += length;
          next = size > 0 ? "data" : "trailers";
        }
      }
    } finally {
      if (end > start) await pass(buffer.subarray(start, end));
    }
    if (next === "trailers") return;
    if (await reader.fill()) continue;
    const where = missing > 0
      ? `${missing} of a chunk's ${plural(size, "byte")} are missing`
      : "before the last chunk";
    throw endedEarly(`${where}, after ${plural(reply.bodyBytes, "byte")}`);
  }
}

/** The size that the line at `start` gives; it is there with its end. */
function chunkSize(buffer: Uint8Array, start: number): number {
  // By hand: as text, a body of small chunks takes 2 to 4 times as long.
  let size = 0, at = start;
  for (let digit; (digit = hexDigit(buffer[at])) >= 0; at++) size = size * 16 + digit;
  const digits = at - start;
  while (buffer[at] === SPACE || buffer[at] === TAB || buffer[at] === CR) at++;
  const isEnd = buffer[at] === LF || buffer[at] === SEMICOLON;
  // curl reads at most 16 digits too.
  if (isEnd && digits >= 1 && digits <= 16 && Number.isSafeInteger(size)) return size;
  const text = lineText(latin1(buffer.subarray(start, buffer.indexOf(LF, start) + 1)));
  throw badReply(`bad chunk size ${quote(text.slice(0, 60))}`);
}

/** The value of a hexadecimal digit, or -1. */
function hexDigit(byte: number): number {
  if (byte >= 0x30 && byte <= 0x39) return byte - 0x30;
  const small = byte | 0x20;
  return small >= 0x61 && small <= 0x66 ? small - 0x57 : -1;
}

// ─── Verdict ────────────────────────────────────────────────────────────────────────────────────

/** What is known of the packets that left. */
export interface Left {
  /** Whether the packets with data left with the mark; `null` if they were not all observed. */
  readonly proved: boolean | null;
  /** The packets seen, oldest first. */
  readonly packets: readonly SentPacket[];
  /** Bytes of data that they carried, and that were sent in all; TLS's own are among them. */
  readonly bytes: { readonly seen: number; readonly sent: number | null };
  /** The first byte seen that is not the mark's. */
  readonly wrong: number | null;
  /** The outer ToS byte of tunnelled packets: the first that differs from the mark, else the first. */
  readonly outerTos: number | null;
  /** What took them instead of the network: what then leaves this host is not observed. */
  readonly takenBy: "a tunnel device" | "a program on this host" | null;
}

const NOT_OBSERVED: Left = {
  proved: null,
  packets: [],
  bytes: { seen: 0, sent: 0 },
  wrong: null,
  outerTos: null,
  takenBy: null,
};

/** Did the mark leave? */
function judgeLeft({ sent: packets, dataSent: sent }: MarkedConn, mark: Mark): Left {
  const isWrong = (tos: number) => !sameDscp(tos, mark.tos);
  const wrong = packets.map(({ tos }) => tos).find(isWrong) ?? null;
  const outer = packets.flatMap(({ outerTos }) => outerTos ?? []);
  const outerTos = outer.find(isWrong) ?? outer[0] ?? null;
  const takenBy = packets.some(({ linkHeader }) => linkHeader === 0)
    ? "a tunnel device"
    : packets.some(({ isRedirected }) => isRedirected)
    ? "a program on this host"
    : null;
  const seen = bytesCovered(packets);
  const isWhole = packets.length > 0 && sent !== null && seen >= sent && takenBy === null;
  const proved = wrong !== null || outer.some(isWrong) ? false : isWhole ? true : null;
  return { proved, packets, bytes: { seen, sent }, wrong, outerTos, takenBy };
}

/** Bytes of data in packets, each counted once: some may have been sent again. */
function bytesCovered(packets: readonly SentPacket[]): number {
  // Sequence numbers wrap around (RFC 9293 section 3.4), so they count from the first.
  const first = packets[0]?.sequence ?? 0;
  const runs = packets.map(({ sequence, payload }) => ({ from: sequence - first | 0, payload }));
  let covered = 0, end = -Infinity;
  for (const { from, payload } of runs.sort((a, b) => a.from - b.from)) {
    covered += Math.max(0, from + payload - Math.max(end, from));
    end = Math.max(end, from + payload);
  }
  return covered;
}

/** What the far end reports, and what follows from it. */
export interface ArrivedReport extends Arrived {
  /** Whether it saw another connection than ours, as with a proxy or NAT in between. */
  readonly isOther: boolean;
  /** The bytes of the marked packets on arrival. */
  readonly marked: readonly number[];
  /** Whether all packets reported have the byte they were sent with; `null` if none was marked. */
  readonly kept: boolean | null;
  /** The first packet that arrived with another byte than it was sent with. */
  readonly changed: { packet: "SYN" | "ACK" | "data"; sent: number; arrived: number } | null;
  /** Whether the handshake arrived with the mark; `null` if it had none, or no SYN is reported. */
  readonly handshake: boolean | null;
}

/** Did packets arrive as they were sent? An unmarked handshake was sent with 0. */
function judgeArrived({ reply, connection, mark }: Exchange): ArrivedReport | null {
  if (reply === null || connection === null) return null;
  const valueOf = (wanted: string) => reply.headers.find(([name]) => name === wanted)?.[1] ?? "";
  const byteOf = (wanted: string): number | null => {
    const value = valueOf(wanted);
    return /^0x[0-9a-f]{2}$/i.test(value) ? Number(value) : null;
  };
  const tos = byteOf("arrived-tos"), { markSyn } = connection.options;
  if (tos === null) return null;
  let [syn, ack, data] = ["arrived-syn", "arrived-ack", "arrived-data"].map(byteOf);
  // A server that sends the one header alone does not say which packet it means.
  const isAlone = syn === null && ack === null && data === null;
  if (isAlone && mark.tos !== 0 && !markSyn && sameDscp(tos, mark.tos)) data = tos;
  else if (isAlone) syn = tos;
  const peer = valueOf("arrived-peer");
  const isOther = peer !== "" && peer !== formatAddress(plainEnd(connection.localAddr));
  const first = markSyn ? mark.tos : 0;
  // A marked request may overtake an unmarked ACK, and end the handshake in its place.
  const isRequest = !markSyn && ack !== null && sameDscp(ack, mark.tos);
  const reported = [
    ["SYN", first, syn],
    ["ACK", first, isRequest ? null : ack],
    ["data", mark.tos, data],
  ] as const;
  const packets = reported.flatMap(([packet, sent, arrived]) =>
    isOther || arrived === null ? [] : [{ packet, sent, arrived }]
  );
  const changes = packets.filter(({ sent, arrived }) => !sameDscp(sent, arrived));
  const marked = packets.filter(({ packet }) => markSyn || packet === "data");
  const isChangedEarly = changes.some(({ packet }) => packet !== "data");
  const isShown = packets.some(({ packet }) => packet === "SYN");
  return {
    syn,
    ack,
    data,
    isOther,
    marked: marked.map(({ arrived }) => arrived),
    kept: changes.length > 0 ? false : marked.length > 0 ? true : null,
    changed: changes[0] ?? null,
    handshake: !markSyn ? null : isChangedEarly ? false : isShown ? true : null,
  };
}

/** Whether all data is reported: IPv6 servers know the latest packet's byte, IPv4 servers none. */
function isWholeReported({ data }: ArrivedReport, { packets }: Left): boolean {
  return data !== null && packets.length === 1;
}

/** One end of a connection, IPv4-mapped addresses as IPv4. */
function plainEnd({ hostname, port }: Deno.NetAddr): Deno.NetAddr {
  return { transport: "tcp", hostname: hostname.replace(/^::ffff:(?=[\d.]+$)/, ""), port };
}

/** 101 or 102, if packets left or arrived with another mark. */
function markFailure({ mark, left, arrived }: Exchange): Failure | null {
  if (left.wrong !== null) {
    const message = `set ${hex(mark.tos)}, left with ${hex(left.wrong)}: ` +
      "something on this host, such as nftables, rewrote it";
    return new Failure(Exit.leftChanged, message);
  }
  if (left.proved === false) {
    const message = `set ${hex(mark.tos)}, left inside a tunnel whose packets carry ` +
      hex(left.outerTos!);
    const hint = "a tunnel has to copy the mark: VXLAN does with 'tos inherit', ip-link(8)";
    return new Failure(Exit.leftChanged, message, hint);
  }
  if (arrived === null || arrived.changed === null) return null;
  const { packet, sent, arrived: tos } = arrived.changed;
  // The handshake was not observed leaving, so this host may have changed it.
  const isPath = left.proved && arrived.data !== null && !sameDscp(arrived.data, mark.tos);
  const verdict = isPath ? "the path rewrote it" : "rewritten by this host or the path";
  const what = sameDscp(sent, mark.tos) ? "" : `${packet} `;
  const message = `${what}sent ${describe(markOf(sent))}, arrived ${describe(markOf(tos))}`;
  return new Failure(Exit.arrivedChanged, `${message}: ${verdict}`);
}

/** What went wrong, all in all: a wrong mark is more than what else happened to the request. */
function verdictOf(exchange: Exchange, options: AskOptions): Failure | null {
  const { failure, target, reply } = exchange, wrong = markFailure(exchange);
  if (failure === null) return wrong ?? proofFailure(exchange, options);
  // An interrupt, or what keeps this program from working, is about the run, not the request.
  const isRun = failure.code >= Exit.notMarked || failure.code === Exit.cannotWrite;
  const isClosed = failure.code === Exit.emptyReply || failure.code === Exit.connectionLost;
  if (wrong === null && isClosed && reply === null && isLikelyTls(target)) {
    return new Failure(failure.code, failure.message, "the server may speak TLS: is it https://?");
  }
  if (wrong === null || isRun) return failure;
  const both = new Failure(wrong.code, `${wrong.message}; ${failure.message}`);
  both.cause = failure;
  return both;
}

/** Which of two failures of a run to end with: the earlier one, or a wrong mark behind another. */
function graver(earlier: Failure | null, later: Failure | null): Failure | null {
  return earlier === null || (isWrongMark(later) && !isWrongMark(earlier)) ? later : earlier;
}

function isWrongMark(failure: Failure | null): boolean {
  return failure?.code === Exit.leftChanged || failure?.code === Exit.arrivedChanged;
}

/** Whether http is asked of a port that is usually for https. */
function isLikelyTls({ isHttps, port }: Target): boolean {
  return !isHttps && /443$/.test(String(port));
}

/** 104, if a proof is required: of what left, and of what arrived if the far end is our own. */
function proofFailure(exchange: Exchange, { requireProof }: AskOptions): Failure | null {
  if (!requireProof) return null;
  const { left: { proved, packets, bytes, takenBy }, arrived, reply } = exchange;
  if (packets.length === 0) return new Failure(Exit.notProved, "no packet was observed leaving");
  if (takenBy !== null) {
    return new Failure(Exit.notProved, `the packets were handed to ${takenBy}`);
  }
  if (proved === null) {
    const message = `only ${bytes.seen} of ${bytes.sent ?? "?"} bytes were observed leaving`;
    return new Failure(Exit.notProved, message);
  }
  if (!isOurs(reply) || (arrived !== null && !arrived.isOther)) return null;
  const message = arrived === null
    ? "the far end does not report what arrived"
    : "the far end reports what arrived on another connection: a proxy or NAT is in between";
  return new Failure(Exit.notProved, message);
}

/** Whether the far end is one of ours. */
function isOurs(reply: Reply | null): boolean {
  return reply?.headers.some(([name, value]) =>
    name === "server" && value.startsWith("dscp-get/")
  ) ?? false;
}

// ─── Report ─────────────────────────────────────────────────────────────────────────────────────

/** Whether standard output is made ready for large bodies. */
let isPrepared = false;

/** Writes all of `bytes` to standard output. @throws {Failure} it does not take them, exit 23 */
async function toStandardOutput(bytes: Uint8Array | string): Promise<void> {
  if (typeof bytes === "string") bytes = new TextEncoder().encode(bytes);
  // What a pipe takes whole or not at all, pipe(7): it can be written again if it did not fit.
  const PIPE_BUF = 4096;
  try {
    if (bytes.length > PIPE_BUF && !isPrepared) prepareStandardOutput();
    // Time limits and signals go on while another thread waits for a slow reader.
    while (bytes.length > 0) bytes = bytes.subarray(await Deno.stdout.write(bytes));
  } catch (error) {
    // A parent may have made it non-blocking.
    if (error instanceof Deno.errors.WouldBlock && !isPrepared) {
      prepareStandardOutput();
      return await toStandardOutput(bytes);
    }
    if (error instanceof Deno.errors.BrokenPipe) throw new Failure(Exit.cannotWrite, "");
    const message = `cannot write to standard output: ${reason(error as Error)}`;
    throw new Failure(Exit.cannotWrite, message);
  }
}

function prepareStandardOutput(): void {
  isPrepared = true;
  // The help must not need a permission.
  if (!isGranted({ name: "ffi" })) return;
  makeBlocking(1);
  widenPipe(1);
}

/** Writes to standard error; if that is closed nobody is there to read it. */
function toStandardError(text: string): void {
  let bytes: Uint8Array = new TextEncoder().encode(text);
  try {
    while (bytes.length > 0) bytes = bytes.subarray(Deno.stderr.writeSync(bytes));
  } catch { /* see above */ }
}

/** Writes a line as wide as the terminal, or for a program a whole one. */
function lineToStandardError(line: string): void {
  const isTerminal = Deno.stderr.isTerminal();
  toStandardError(isTerminal ? wrapped(line, widthOf(Deno.stderr)) : `${line}\n`);
}

/** Where a reply goes under these options; a series is for its times, so its bodies are dropped. */
function sinkFor(options: Options): Sink {
  const isDropped = options.json || options.trace || isSeries(options);
  const bytesOf = (line: string) => Uint8Array.from(line, (c) => c.charCodeAt(0));
  return {
    ...options.include && !isDropped && { head: (line) => toStandardOutput(bytesOf(line)) },
    ...options.fail && { begin: failOnError },
    ...!isDropped && { body: toStandardOutput },
  };
}

function failOnError({ status, reason }: Reply): void {
  if (status < 400) return;
  const message = excerpt(`the server answered ${status} ${reason}`.trim());
  throw new Failure(Exit.httpError, message);
}

/** The report's lines: what is known of an exchange, for a person. @param isOver it has ended */
function report(exchange: Exchange, isBuiltIn: boolean, isOver = true): string[] {
  const { connection, mark, left, arrived, reply, milliseconds, failure } = exchange;
  if (connection === null) return [];
  const { localAddr, remoteAddr, fd, readBack, options } = connection;
  const ends = `${formatAddress(localAddr)} → ${formatAddress(remoteAddr)}`;
  const name = `${mark.name ?? "no name"} = DSCP ${mark.dscp} = byte ${hex(mark.tos)}`;
  const lines: [label: string, text: string][] = [
    ["connected", `${ends}${isBuiltIn ? ", the built-in server" : ""}; descriptor ${fd}`],
    ["mark", `${name}; the kernel reads back ${hex(readBack!)}`],
  ];
  // A TLS handshake that fails takes the descriptor with it, before anything could be read.
  const isLeftKnown = left.packets.length > 0 || (isOver && reply !== null);
  if (isLeftKnown) lines.push(["left", leftText(left)]);
  if (isOver) {
    // That the built-in server saw an unmarked handshake is in the last line.
    const isNews = arrived !== null && (arrived.kept !== null || arrived.isOther || !isBuiltIn);
    if (isNews) lines.push(["arrived", arrivedText(arrived, left)]);
    // With -f the body of an error is left unread.
    const isCut = reply?.complete === false && failure?.code !== Exit.httpError;
    if (reply !== null) lines.push(["reply", replyText(reply, milliseconds.total!, isCut)]);
    lines.push(["handshake", handshakeText(options.markSyn, arrived)]);
  }
  const width = widthOf(Deno.stderr) - 11;
  const isColored = Deno.stderr.isTerminal() && !Deno.noColor;
  const colored = (code: number, text: string) => isColored ? `\x1b[${code}m${text}\x1b[0m` : text;
  return lines.map(([label, text]) => {
    const wrappedText = text.split("\n").map((line) => wrapped(line, width)).join("").trimEnd();
    return colored(1, label.padEnd(11)) +
      wrappedText.replaceAll("\n", `\n${" ".repeat(11)}`)
        .replace(/\bproved(?= by|$|\n)/, (word) => colored(32, word))
        .replace(/NOT the mark/, (words) => colored(31, words)) +
      "\n";
  });
}

function leftText({ proved, packets, bytes, outerTos, takenBy }: Left): string {
  if (packets.length === 0) {
    return "not observed: no copy came back; the device may not make any, NAT may\n" +
      "hide them, or sysctl net.core.tstamp_allow_data is 0";
  }
  const marks = [...new Set(packets.map(({ tos }) => hex(tos)))].join(" and ");
  const seen = `${plural(packets.length, "packet")} with ${marks}`;
  const tunnel = `, inside a tunnel\nwhose packets carry ${outerTos === null ? "" : hex(outerTos)}`;
  const where = `, read from the IP header${outerTos === null ? "" : tunnel}`;
  const isEcn = packets.some(({ tos }) => (tos & 3) !== 0);
  const ecn = isEcn ? "\n(its two lowest bits are ECN, which TCP sets by itself)" : "";
  if (proved === false) return `${seen}${where}: NOT the mark that was set${ecn}`;
  if (takenBy !== null) {
    return `${seen}, handed to ${takenBy}, whose own packets are not observed${ecn}`;
  }
  if (proved === null) {
    return `${seen}: proved for ${bytes.seen} of ${bytes.sent ?? "?"} bytes${ecn}`;
  }
  return `${seen}${where}: proved${ecn}`;
}

function arrivedText(arrived: ArrivedReport, left: Left): string {
  const { syn, ack, data, isOther, kept } = arrived;
  const reported = Object.entries({ SYN: syn, ACK: ack, data }).filter(([, tos]) => tos !== null);
  const bytes = reported.map(([packet, tos]) => `${packet} ${hex(tos!)}`).join(", ");
  if (isOther) {
    return `${bytes}, reported by the server for another connection:\na proxy or NAT in between`;
  }
  if (kept === null) {
    return `${bytes} at the server; whether the mark arrived is unknown without --mark-syn`;
  }
  const where = isWholeReported(arrived, left) ? "the path" : "on these packets";
  const survived = `the mark survived ${where}`;
  return `${bytes} at the server: ${kept ? survived : "NOT the mark that was sent"}`;
}

function handshakeText(markedSyn: boolean, arrived: ArrivedReport | null): string {
  const { isOther = false, changed = null } = arrived ?? {};
  const confirmed = arrived !== null && !isOther ? arrived.syn ?? arrived.ack : null;
  if (!markedSyn && changed !== null && changed.packet !== "data") {
    return `sent unmarked, but ${changed.packet} arrived with ${hex(changed.arrived)}`;
  }
  if (!markedSyn && confirmed !== null && sameDscp(confirmed, 0)) {
    return `unmarked, as the server confirms (${hex(confirmed)}); --mark-syn marks it too`;
  }
  if (!markedSyn) {
    return "unmarked: SYN and ACK leave before the mark is set; --mark-syn marks them";
  }
  const proved = arrived?.handshake ?? null;
  if (isOther) return "set before the SYN; not proved: a proxy or NAT is in between";
  if (proved === null) return "set before the SYN; not proved (--serve at the far end reports it)";
  const verdict = proved ? "proved by the mark" : "NOT the mark";
  return `set before the SYN; ${verdict} that the server reports`;
}

function replyText(reply: Reply, total: number, isCut: boolean): string {
  const { status, reason, headers, tos, bodyBytes } = reply;
  const location = headers.find(([name]) => name === "location")?.[1];
  const isRedirect = location !== undefined && status >= 300 && status < 400;
  const size = `${isCut ? "only " : ""}${plural(bodyBytes, "byte")} in ${total.toFixed(1)} ms`;
  const marked = tos === null ? "" : `, its packets marked ${hex(tos)}`;
  const leads = isRedirect ? `; leads to ${excerpt(location)}, not followed` : "";
  return `${excerpt(`${status} ${reason}`.trim())}, ${size}${marked}${leads}`;
}

/** The exchange as one line of JSON, in the form that the README describes. */
function json(
  place: Place | null,
  exchange: Exchange | null,
  failure: Failure | null,
  round = 0,
  trace: Trace | null = null,
): string {
  const { connection, mark, left, arrived, reply } = exchange ?? {};
  const end = (address: Deno.NetAddr | undefined) =>
    address === undefined ? null : { address: address.hostname, port: address.port };
  const { tos, trailers, ...plain } = reply ?? {};
  const object = {
    ...round > 0 && { round },
    ...exchange && {
      url: exchange.target.url,
      server: place?.isBuiltIn ? "built-in" : "remote",
      local: end(connection?.localAddr),
      remote: end(connection?.remoteAddr),
      mark: {
        ...mark,
        readBack: connection?.readBack ?? null,
        handshake: connection?.options.markSyn ?? null,
        handshakeProved: arrived?.handshake ?? null,
      },
      left: {
        proved: left!.proved,
        bytes: left!.bytes,
        outerTos: left!.outerTos,
        packets: left!.packets.map(({ tos, length }) => ({ tos, length })),
      },
      // What arrived on another connection says nothing of this one.
      arrived: arrived?.isOther === false
        ? { syn: arrived.syn, ack: arrived.ack, data: arrived.data }
        : null,
      reply: reply && {
        ...plain,
        ...trailers!.length > 0 && { trailers },
        ...tos !== null && { tos },
      },
      milliseconds: exchange.milliseconds,
    },
    ...trace && !exchange && { url: place?.target.url, mark: trace.mark },
    ...trace && { path: trace.path, changed: trace.changes[0] ?? null },
    ...failure && { error: { code: failure.code, message: failure.message } },
  };
  return jsonLine(object);
}

/** A line of JSON: fractions to six digits; what would act on a terminal is escaped. */
function jsonLine(object: unknown): string {
  const rounded = (_: string, value: unknown) =>
    typeof value === "number" && value % 1 !== 0 ? Number(value.toPrecision(6)) : value;
  // JSON.stringify leaves DEL, C1 and direction marks as they are.
  return JSON.stringify(object, rounded).replace(
    /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  ) + "\n";
}

/** What left, once all of an http request has; TLS may have more to send. */
function lookAtRequest(exchange: Exchange): void {
  const { connection, target, mark } = exchange;
  if (connection === null || target.isHttps) return;
  const left = judgeLeft(connection, mark), { requestSize } = connection.options;
  if (left.proved !== null && left.bytes.sent === requestSize) exchange.left = left;
}

/** One request, its report or JSON. */
async function single(place: Place, options: Options): Promise<Failure | null> {
  const askOptions = await askOptionsOf(options), limits = new Limits(askOptions);
  const isReported = !options.json && !options.silent;
  let current: Exchange | null = null, shown: string[] = [], isLineOpen = false;
  const show = (exchange: Exchange, isOver: boolean) => {
    if (isOver && isLineOpen && Deno.stderr.isTerminal()) toStandardError("\n");
    if (!isReported || exchange.failure?.code === Exit.cannotRun) return;
    const lines = report(exchange, place.isBuiltIn, isOver);
    // Later on, only the lines that have changed.
    toStandardError(lines.filter((line) => !shown.includes(line)).join(""));
    shown = lines;
  };
  using _signals = onInterrupt((code) => {
    if (Deno.stderr.isTerminal()) toStandardError("\n");
    limits.stop(new Failure(code, "interrupted"));
  });
  const watch = (exchange: Exchange) => {
    current = exchange;
    // Every second what is known so far, until the body begins on the same terminal.
    const look = () => {
      if (current === null || (current.reply !== null && Deno.stdout.isTerminal())) return;
      lookAtRequest(current);
      show(exchange, false);
      pause(1000).then(look);
    };
    pause(1000).then(look);
  };
  const sink = sinkFor(options), { body } = sink;
  if (body !== undefined && Deno.stdout.isTerminal()) {
    sink.body = (piece) => {
      // As curl does, which looks for a zero byte too.
      if (piece.includes(0)) {
        const hint = "redirect it, with > FILE or through a pipe";
        throw new Failure(Exit.cannotWrite, "the reply is binary and can mess up a terminal", hint);
      }
      isLineOpen = piece.at(-1) !== LF;
      return body(piece);
    };
  }
  const exchange = await ask(place.target, options.marks[0], askOptions, sink, { limits, watch });
  current = null;
  await checkPresent(exchange, place, options, limits);
  const failure = limits.stopped ?? exchange.failure;
  if (options.json) await toStandardOutput(json(place, exchange, failure));
  else show(exchange, true);
  return failure;
}

// ─── Series ─────────────────────────────────────────────────────────────────────────────────────

/** What became of the requests with one mark. */
export class Row {
  /** How many requests were made. */
  requests = 0;
  /** How many of them failed for another reason than a wrong mark. */
  failed = 0;
  /** How many of them left or arrived with another mark. */
  wrong = 0;
  /** The bytes that packets left with, as far as they were seen. */
  readonly left: Set<number> = new Set();
  /** The bytes that marked packets arrived with, as far as the far end reports them. */
  readonly arrived: Set<number> = new Set();
  /** What unmarked packets arrived with that had been changed, such as `SYN 0x20`. */
  readonly changed: Set<string> = new Set();
  /** Milliseconds to connect, of those requests whose whole reply came. */
  readonly connect: number[] = [];
  /** Milliseconds of those requests in all. */
  readonly total: number[] = [];

  /** A row without requests. @param mark the mark of all its requests */
  constructor(readonly mark: Mark) {}

  /** Adds a request. */
  add({ connection, left, arrived, reply, milliseconds, failure }: Exchange): void {
    this.requests++;
    if (left.proved === false || arrived?.kept === false) this.wrong++;
    const isMark = failure?.code === Exit.leftChanged || failure?.code === Exit.arrivedChanged;
    if (failure !== null && !(isMark && reply?.complete)) this.failed++;
    for (const { tos } of left.packets) this.left.add(tos);
    if (left.outerTos !== null) this.left.add(left.outerTos);
    for (const tos of arrived?.marked ?? []) this.arrived.add(tos);
    const { packet, arrived: tos } = arrived?.changed ?? {};
    if (tos !== undefined && packet !== "data" && !connection!.options.markSyn) {
      this.changed.add(`${packet} ${hex(tos)}`);
    }
    if (!reply?.complete) return;
    this.connect.push(milliseconds.connect!);
    this.total.push(milliseconds.total!);
  }
}

/** The value below which `share` (0 to 1) of the values lie, by nearest rank; `NaN` of none. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? NaN;
}

/** A bar of `share` (0 to 1) of `width` characters, to an eighth of one. */
export function bar(share: number, width: number): string {
  const eighths = Math.round(share * width * 8);
  return "█".repeat(eighths >> 3) + (eighths % 8 === 0 ? "" : "▏▎▍▌▋▊▉"[eighths % 8 - 1]);
}

/** The rows as a table of at most `width` columns; a bar shows each median if there is room. */
export function table(rows: readonly Row[], width = 80): string {
  const bytes = (seen: Set<number>, mark: Mark, changed: Set<string> = new Set()) => {
    const words = [...Array.from(seen, hex), ...changed];
    const isRight = changed.size === 0 && [...seen].every((tos) => sameDscp(tos, mark.tos));
    return words.length === 0 ? "-" : `${words.join(" ")}${isRight ? "" : " !"}`;
  };
  const time = (values: number[], share: number) => shortTime(quantile(values, share));
  type Column = [title: string, under: string, cells: string[], isText?: boolean];
  const columns: Column[] = [
    ["", "mark", rows.map(({ mark }) => nameOf(mark)), true],
    ["", "left", rows.map(({ left, mark }) => bytes(left, mark)), true],
    ["", "arrived", rows.map(({ arrived, mark, changed }) => bytes(arrived, mark, changed)), true],
    ["", "requests", rows.map(({ requests }) => String(requests))],
    ["", "failed", rows.map(({ failed }) => String(failed))],
    ["wrong", "mark", rows.map(({ wrong }) => String(wrong))],
    ["connect ms", "median", rows.map(({ connect }) => time(connect, 0.5))],
    ["total ms", "median", rows.map(({ total }) => time(total, 0.5))],
    ["", "p95", rows.map(({ total }) => time(total, 0.95))],
    ["", "max", rows.map(({ total }) => time(total, 1))],
  ];
  const columnWidth = ([title, under, cells]: Column) =>
    Math.max(...[title, under, ...cells].map(({ length }) => length));
  const used = () => columns.reduce((sum, column) => sum + columnWidth(column) + 1, 0);
  // What goes first on a narrow terminal: the time to connect, and then from the right.
  for (let at = 6; used() > width + 1 && columns.length > 3; at = columns.length - 1) {
    columns.splice(at, 1);
  }
  const room = Math.min(24, width - used());
  if (room >= "of median".length) {
    const medians = rows.map(({ total }) => quantile(total, 0.5));
    const longest = Math.max(...medians.filter(Number.isFinite));
    const bars = medians.map((median) => bar(median / longest || 0, room));
    columns.push(["bar:", "of median", bars, true]);
  }
  const line = (cellOf: (column: Column) => string) =>
    columns.map((column) => {
      const cell = cellOf(column);
      return column[3] ? cell.padEnd(columnWidth(column)) : cell.padStart(columnWidth(column));
    }).join(" ").trimEnd().slice(0, width) + "\n";
  const body = rows.map((_, row) => line(([, , cells]) => cells[row]));
  return line(([title]) => title) + line(([, under]) => under) + body.join("");
}

function nameOf({ name, dscp }: Mark): string {
  return name ?? String(dscp);
}

/** Milliseconds in few characters: `0.42`, `17.3`, `1520`. */
function shortTime(milliseconds: number): string {
  if (!Number.isFinite(milliseconds)) return "-";
  return milliseconds.toFixed(milliseconds < 1 ? 2 : milliseconds < 100 ? 1 : 0);
}

/**
 * The two-sided p-value of the Mann–Whitney U test, by its normal approximation with corrections for
 * ties and for continuity: how likely two samples of the same kind would be as far apart in rank.
 *
 * @returns 0 to 1; 1 if a sample is empty or all values are equal
 */
export function mannWhitney(a: readonly number[], b: readonly number[]): number {
  const all = [
    ...a.map((value) => ({ value, isA: true })),
    ...b.map((value) => ({ value, isA: false })),
  ];
  all.sort((x, y) => x.value - y.value);
  const n = all.length;
  let rankSum = 0, ties = 0;
  for (let first = 0, next; first < n; first = next) {
    for (next = first + 1; next < n && all[next].value === all[first].value;) next++;
    const rank = (first + next + 1) / 2;
    for (let at = first; at < next; at++) if (all[at].isA) rankSum += rank;
    ties += (next - first) ** 3 - (next - first);
  }
  const u = rankSum - a.length * (a.length + 1) / 2;
  const variance = a.length * b.length / 12 * (n + 1 - ties / (n * (n - 1)));
  const distance = Math.max(0, Math.abs(u - a.length * b.length / 2) - 0.5);
  return variance > 0 ? Math.min(1, 2 * normalTail(distance / Math.sqrt(variance))) : 1;
}

/** The chance of a standard normal value above `z`, `z` from 0 up. */
function normalTail(z: number): number {
  const density = Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
  if (z < 3) {
    let term = z, sum = z;
    for (let k = 3; term > 1e-17; k += 2) sum += term *= z * z / k;
    return 0.5 - density * sum;
  }
  let fraction = z;
  for (let k = 60; k > 0; k--) fraction = z + k / fraction;
  return density / fraction;
}

const SIGNIFICANT = 0.01, SMALLEST_RATIO = 1.05, MIN_SAMPLES = 8;

/** How the times with one mark compare with those of another. */
export interface Comparison {
  /** The mark compared with. */
  readonly against: Mark;
  /** Its median total time divided by ours: above 1 is faster; `NaN` without replies. */
  readonly ratio: number;
  /** The p-value of the rank test, 0 to 1; `NaN` without replies. */
  readonly p: number;
  /** Whether there is a difference: `null` if there are too few replies to say. */
  readonly differs: boolean | null;
}

/**
 * Compares each row with best effort, or with the first row if there is no such mark.
 *
 * @returns a comparison for each row; `null` for the one that the others are compared with
 */
export function compare(rows: readonly Row[]): (Comparison | null)[] {
  const reference = rows.find(({ mark }) => mark.dscp === 0) ?? rows[0];
  return rows.map((row) => {
    if (row === reference) return null;
    const isKnown = row.total.length > 0 && reference.total.length > 0;
    const p = isKnown ? mannWhitney(row.total, reference.total) : NaN;
    const ratio = quantile(reference.total, 0.5) / quantile(row.total, 0.5);
    // Of many comparisons some would seem real by chance (Bonferroni). With many requests even a
    // negligible difference becomes significant, so it must also be large enough.
    const isReal = p < SIGNIFICANT / (rows.length - 1) &&
      Math.max(ratio, 1 / ratio) >= SMALLEST_RATIO;
    const isEnough = Math.min(row.total.length, reference.total.length) >= MIN_SAMPLES;
    return { against: reference.mark, ratio, p, differs: isEnough ? isReal : null };
  });
}

/** Whether the network cared, in sentences of at most `width` columns a line; none for one mark. */
export function verdict(rows: readonly Row[], width = 80): string {
  const compared = compare(rows).flatMap((one, at) =>
    one === null ? [] : [{ ...one, name: nameOf(rows[at].mark) }]
  );
  if (compared.length === 0) return "";
  const few = compared.filter(({ differs }) => differs === null);
  const same = compared.filter(({ differs }) => differs === false);
  const list = (some: readonly { name: string }[]) =>
    some.length > 4 ? `${some.length} others` : some.map(({ name }) => name).join(", ");
  const parts = compared.filter(({ differs }) => differs).map(({ name, ratio, p }) => {
    const factor = Math.max(ratio, 1 / ratio), word = ratio > 1 ? "faster" : "slower";
    return `${name} is ${factor.toFixed(factor < 10 ? 2 : 0)} times ${word} (p = ${shortP(p)})`;
  });
  if (same.length > 0) parts.push(`no difference seen for ${list(same)}${leastP(same)}`);
  if (few.length > 0) parts.push(`too few replies, under ${MIN_SAMPLES}, for ${list(few)}`);
  const text = few.length < compared.length
    ? parts.join(", ")
    : `with fewer than ${MIN_SAMPLES} replies to a mark no difference can be seen${leastP(few)}`;
  return wrapped(`Against ${nameOf(compared[0].against)}, median total time: ${text}.`, width);
}

/** The smallest p, behind a space and in brackets; nothing if none is known. */
function leastP(compared: readonly Comparison[]): string {
  const known = compared.map(({ p }) => p).filter(Number.isFinite);
  if (known.length === 0) return "";
  return ` (p ${compared.length > 1 ? "≥" : "="} ${shortP(Math.min(...known))})`;
}

/** A probability in few characters: `0.021`, `5.2e-6`. */
function shortP(p: number): string {
  return p < 0.001 ? p.toExponential(1) : p.toPrecision(2);
}

/** The rows as one line of JSON. */
function summaryJson(rows: readonly Row[]): string {
  const compared = compare(rows);
  const summary = rows.map((
    { mark, requests, failed, wrong, left, arrived, changed, connect, total },
    at,
  ) => ({
    mark,
    requests,
    failed,
    wrong,
    left: [...left],
    arrived: [...arrived],
    changed: [...changed],
    milliseconds: {
      connect: { median: quantile(connect, 0.5) },
      total: { median: quantile(total, 0.5), p95: quantile(total, 0.95), max: quantile(total, 1) },
    },
    compared: compared[at] && { ...compared[at], against: nameOf(compared[at].against) },
  }));
  // JSON writes NaN as null: unknown.
  return jsonLine({ summary });
}

/**
 * Several marks in turn, round after round, and the table of them.
 *
 * @returns the first failure, a wrong mark before others, or `null`
 */
async function series(place: Place, options: Options): Promise<Failure | null> {
  const rows = options.marks.map((mark) => new Row(mark));
  const count = options.count * rows.length;
  const askOptions = await askOptionsOf(options), limits = new Limits(askOptions);
  const sink = sinkFor(options);
  using screen = new Screen(!options.json && !options.silent);
  const result = async () => {
    screen.clear();
    if (options.json) await toStandardOutput(summaryJson(rows));
    else if (!options.silent) {
      const width = widthOf(Deno.stdout);
      await toStandardOutput(table(rows, width) + verdict(rows, width));
    }
  };
  let release = () => {};
  // Standard output may have a reader that has stopped. Not Promise.race, as in readReply.
  const orInterrupt = (work: Promise<void>) =>
    new Promise<void>((resolve, reject) => {
      release = resolve;
      work.then(resolve, reject);
      if (limits.stopped !== null) resolve();
    });
  using _signals = onInterrupt((code) => {
    const after = done > 0 ? ` after ${done} of ${plural(count, "request")}` : "";
    limits.stop(new Failure(code, `interrupted${after}`));
    release();
  });
  let first: Failure | null = null, done = 0;
  await orInterrupt(warmUp(place.target, options.marks[0], askOptions));
  for (let round = 1; round <= options.count; round++) {
    for (const row of rows) {
      if (done > 0 && options.interval > 0) {
        await orInterrupt(pause(options.interval * 1000));
      }
      const exchange = await ask(place.target, row.mark, askOptions, sink, { limits });
      if (limits.stopped !== null) {
        const last = () => toStandardOutput(json(place, exchange, limits.stopped, round));
        const printing = done > 0 ? result() : options.json ? last() : null;
        await Promise.race([printing, pause(200)]);
        return limits.stopped;
      }
      if (done === 0) await checkPresent(exchange, place, options, limits);
      const { failure } = exchange;
      // Without a permission or libc all others would fail the same way.
      if (failure?.code === Exit.cannotRun) throw failure;
      first = graver(first, failure);
      row.add(exchange);
      done++;
      if (options.json) {
        await orInterrupt(toStandardOutput(json(place, exchange, failure, round)));
      } else {
        const progress = `${done} of ${count} requests, Ctrl-C ends it here\n`;
        screen.offer((width) => table(rows, width) + progress);
      }
    }
  }
  await orInterrupt(result());
  if (first === null || limits.stopped !== null) return limits.stopped;
  const sum = (of: "failed" | "wrong") => rows.reduce((sum, row) => sum + row[of], 0);
  const parts = [
    ...sum("failed") > 0 ? [`${sum("failed")} of ${plural(count, "request")} failed`] : [],
    ...sum("wrong") > 0 ? [`${sum("wrong")} of ${plural(count, "request")} with a wrong mark`] : [],
  ];
  const which = sum("failed") > 0 && isWrongMark(first) ? "the first of these" : "the first";
  return new Failure(first.code, `${parts.join(", ")}; ${which}: ${first.message}`);
}

/** Unmeasured requests to ourselves, so that no mark pays for the loading and compiling of code. */
async function warmUp({ isHttps }: Target, mark: Mark, options: AskOptions): Promise<void> {
  if (!isGranted({ name: "net", host: DEFAULT_HOST })) return;
  await using place = builtInServer(Deno.listen({ hostname: DEFAULT_HOST, port: 0 }));
  const local = { ...options, family: options.family && 4 as const, maxTime: 1 };
  // The built-in server does not speak TLS; a handshake that fails warms most of it up.
  if (isHttps) await ask({ ...place.target, isHttps }, mark, local, {});
  for (let at = 0; at < 16; at++) {
    if ((await ask(place.target, mark, local, {})).failure !== null) return;
  }
}

/** Lines on a terminal's standard error that are replaced by newer ones. */
class Screen implements Disposable {
  readonly #isLive: boolean;
  /** How long the lines are that were drawn last. */
  #drawn: number[] = [];
  #drawnAt = -Infinity;

  constructor(isWanted: boolean) {
    this.#isLive = isWanted && Deno.stderr.isTerminal();
  }

  /** Draws ten times a second at most. @param text gets the number of columns */
  offer(text: (width: number) => string): void {
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

// ─── Trace ──────────────────────────────────────────────────────────────────────────────────────

/** How {@linkcode trace} asks; `connectTimeout` is for the whole path (60). */
export interface TraceOptions extends GetOptions {
  /** The most hops to try, 1 to 64 (30). */
  readonly maxHops?: number;
}

/** A place on a path where a mark was changed. */
export interface Change {
  /** The last hop known to have received the mark as it was; 0 is this host. */
  readonly after: number;
  /** The first hop known to have received another; `null` for one at an unknown distance. */
  readonly at: number | null;
  /** The byte before. */
  readonly from: number;
  /** The byte behind. */
  readonly to: number;
}

/** What traces of one path have in common. */
interface Route {
  readonly target: Target;
  readonly options: AskOptions & { readonly maxHops: number };
  readonly sink: Sink;
}

/** A path: an iterable of its hops, as they answer, that ends with the request. Iterate it once. */
export class Trace implements AsyncIterable<Hop> {
  /** The hops so far. */
  readonly path: Hop[] = [];
  /** The request, once the hops are there. */
  exchange: Exchange | null = null;
  readonly #route: Route;
  readonly #climb: Climb | null;

  /** For {@linkcode trace}. @param climb one that other traces use as well */
  constructor(readonly mark: Mark, route: Route, climb: Climb | null = null) {
    this.#route = route;
    this.#climb = climb;
  }

  /** Where the mark was changed, nearest first. */
  get changes(): Change[] {
    const changes: Change[] = [];
    let after: number | null = 0, from = this.mark.tos;
    for (const { hop, tos } of this.path) {
      if (tos === null) continue;
      if (!sameDscp(tos, from)) changes.push({ after: after!, at: hop, from, to: tos });
      [after, from] = [hop, tos];
    }
    return changes;
  }

  /** Climbs the path, then makes the request on the connection of the last probe. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Hop, void> {
    const { target, sink } = this.#route, options = { ...this.#route.options, markSyn: true };
    using own = this.#climb === null ? await climbTo(target, options, false) : null;
    const limits = new Limits({ ...options, maxTime: 0 });
    const hops = (this.#climb ?? own!).climb(
      this.mark.tos,
      options.maxHops,
      limits.begin({ ...target, isHttps: false }),
    );
    let last: Hop | null = null, started = performance.now();
    const watch = (exchange: Exchange) => this.exchange = exchange;
    let open: AskContext["open"];
    try {
      let step;
      while (!(step = await hops.next()).done) {
        this.path.push(step.value);
        yield step.value;
      }
      const { conn } = step.value;
      [last, started] = [step.value.hop, step.value.started];
      open = (to) => Promise.resolve(MarkedConn.adopt(conn!, to));
    } catch (error) {
      open = () => Promise.reject(error);
    } finally {
      limits.end();
    }
    const exchange = await ask(target, this.mark, options, sink, { started, open, watch });
    if (last !== null) {
      const tos = reportedByServer(exchange)?.arrived ?? null;
      last = { ...last, tos, evidence: tos === null ? null : "server" };
      this.path.push(last);
    }
    this.exchange = exchange;
    if (last !== null) yield last;
  }

  /** What went wrong: 102 if a hop received another mark, unless it was changed on this host. */
  get failure(): Failure | null {
    const { mark, path, changes: [change], exchange } = this;
    const failure = exchange?.failure ?? null;
    const own: number[] = [Exit.cannotRun, Exit.notMarked, Exit.leftChanged];
    if (change === undefined || own.includes(failure?.code ?? 0)) return failure;
    const other = failure?.code === Exit.arrivedChanged ? failure.cause : failure;
    const more = other instanceof Failure ? `; ${other.message}` : "";
    // Nobody saw the SYN leave, so this host may have changed it.
    const who = change.after === 0 ? "this host or the path" : "the path";
    const message = `${who} changed ${describe(mark)} to ${describe(markOf(change.to))} ` +
      `between ${hopName(change.after, path, false)} and ${hopName(change.at, path, false)}${more}`;
    return new Failure(Exit.arrivedChanged, message, failure?.hint);
  }
}

/**
 * The path to a URL's host, hop by hop, for other programs: what each router received of a mark.
 *
 * ```ts
 * import { trace } from "./main.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
 * const path = trace(`http://127.0.0.1:${server.addr.port}/`, { dscp: "AF41" });
 * for await (const { hop, address, answer } of path) {
 *   console.log(hop, address, answer); // 1 127.0.0.1 connected
 * }
 * console.log(path.changes, path.exchange?.reply?.status); // [] 200
 * await server.shutdown();
 * ```
 *
 * On IPv6 routers show the whole mark to anybody, on IPv4 to a process with CAP_NET_RAW. What goes
 * wrong is not thrown, but is the trace's `failure`; only what the sink throws comes out as it is.
 *
 * @param sink where the reply goes; without one it is read and thrown away
 * @throws {Failure} a bad URL or header
 * @throws {RangeError} not a DSCP, a time limit or a number of hops
 */
export function trace(url: string | URL, options: TraceOptions = {}, sink: Sink = {}): Trace {
  const defaults = { ...ASK_DEFAULTS, dscp: "EF", maxHops: 30, connectTimeout: TRACE_TIMEOUT };
  const { dscp, ...askOptions } = complete(defaults, options), { maxHops } = askOptions;
  if (!(maxHops >= 1 && maxHops <= MAX_HOPS)) {
    throw new RangeError(`maxHops is a number from 1 to ${MAX_HOPS}, not ${maxHops}`);
  }
  const route = { target: parseTarget(String(url)), options: askOptions, sink };
  return new Trace(parseDscp(String(dscp)), route);
}

/** The packet of this connection that the far end reports, the SYN if it can: as routers see it. */
function reportedByServer({ arrived }: Exchange): { packet: string; arrived: number } | null {
  if (arrived === null || arrived.isOther) return null;
  const packets = Object.entries({ SYN: arrived.syn, data: arrived.data, ACK: arrived.ack });
  const [packet, tos] = packets.find(([, tos]) => tos !== null)!;
  return { packet, arrived: tos! };
}

/** The row of the hop that came last, below the table's head if it is the first. */
function hopRow({ mark, path, changes, exchange }: Trace, width: number): string {
  const hop = path.at(-1)!;
  const addressWidth = Math.max(15, path[0].address?.length ?? 0);
  const head = `hop  ${"address".padEnd(addressWidth)}     ms  mark there`.slice(0, width);
  const number = String(hop.hop ?? "?").padStart(3);
  let row = `${number}  (no answer)`;
  if (hop.address !== null) {
    const time = shortTime(hop.milliseconds!).padStart(6);
    const start = `${number}  ${hop.address.padEnd(addressWidth)} ${time}`;
    const isChanged = changes.at(-1)?.at === hop.hop && hop.tos !== null;
    const text = `${markThere(hop, mark, exchange)}${isChanged ? "   changed" : ""}`;
    const isWide = start.length + 2 + text.length > width;
    const indent = Math.max(3, Math.min(addressWidth + 12, width - 2 - text.length));
    row = `${start}${isWide ? `\n${" ".repeat(indent)}` : ""}  ${text}`;
  }
  return path.length === 1 ? `${head}\n${row}\n` : `${row}\n`;
}

/** What is known of the mark at a hop that answered. */
function markThere(hop: Hop, mark: Mark, exchange: Exchange | null): string {
  const { tos, evidence, answer } = hop;
  const name = tos === null ? "" : describe(sameDscp(tos, mark.tos) ? mark : markOf(tos));
  if (evidence === "server") {
    return `connected; server reports ${reportedByServer(exchange!)!.packet} ${name}`;
  }
  if (isTarget(hop)) return answer!;
  const there = tos !== null ? name : evidence === "icmp" ? "lower bits kept" : "unknown";
  return answer === "time exceeded" ? there : `${there}; ${answer}`;
}

function hopName(hop: number | null, path: readonly Hop[], withAddress = true): string {
  if (hop === 0) return "this host";
  const found = path.find((other) => other.hop === hop)!, { address } = found;
  // At an unknown distance the answer may be a router's as well.
  if (hop === null && !isTarget(found)) return `${address}, at an unknown distance`;
  const name = hop === null ? "the target" : `hop ${hop}`;
  return withAddress && address !== null ? `${name} (${address})` : name;
}

/** Whether it is the target itself that answered. */
function isTarget({ answer }: Hop): boolean {
  return answer === "connected" || answer === "connection refused";
}

/** What became of a mark, in a word and in a sentence that begins "it was". */
function pathVerdict({ path, changes, exchange }: Trace): { sort: string; text: string } {
  const places = changes.map((change) => {
    const isHere = change.after === 0 && exchange?.left.wrong != null;
    const place = isHere ? "on this host" : placeOf(change, path);
    return `to ${describe(markOf(change.to))} ${place}`;
  });
  if (places.length > 0) return { sort: "changed", text: `changed ${places.join(", then ")}` };
  const seen = path.findLast(({ tos }) => tos !== null);
  const isWhole = seen?.evidence === "server";
  const far = isWhole ? "all the way" : seen && `as far as ${hopName(seen.hop, path)}`;
  const { left = NOT_OBSERVED, arrived = null } = exchange ?? {}, later = arrived?.changed;
  const other = left.wrong !== null
    ? `the request left this host as ${describe(markOf(left.wrong))}`
    : isWhole && later
    ? `${later.packet} arrived as ${describe(markOf(later.arrived))}`
    : null;
  if (far && other) return { sort: "changed", text: `kept ${far} on the SYN, but ${other}` };
  if (isWhole) {
    const isAll = arrived !== null && isWholeReported(arrived, left);
    const text = isAll ? ": the server reports it" : " on the packets that the server reports";
    return { sort: "kept all the way", text: `kept ${far}${text}` };
  }
  if (seen !== undefined) {
    return { sort: "kept as far as shown", text: `kept ${far}, the last that showed it` };
  }
  const hint = path.findLast(({ evidence }) => evidence === "icmp");
  const text = hint !== undefined
    ? `kept in its lower bits as far as ${hopName(hint.hop, path)}; no more is known`
    : path.some(({ answer }) => answer === "time exceeded")
    ? "not shown by the routers that answered"
    : path[0]?.hop === 1 && isTarget(path[0])
    ? "not shown: the first hop is the target, which does not report it"
    : "not seen: no router answered, nothing is known of the path";
  return { sort: "not shown", text };
}

/** Between which two hops, and which in between do not show the mark. */
function placeOf({ after, at }: Change, path: readonly Hop[]): string {
  const unseen = path.filter(({ hop, tos }) =>
    tos === null && hop !== null && hop > after && hop < (at ?? Infinity)
  );
  const numbers = unseen.map(({ hop }) => hop).join(", ");
  const state = unseen.every(({ answer }) => answer === null) ? "silent" : "unknown";
  const note = numbers === "" ? "" : ` (${state} in between: ${numbers})`;
  return `between ${hopName(after, path)} and ${hopName(at, path)}${note}`;
}

/** Several marks: a table if it fits, what was changed in words, and how many were kept. */
function marksReport(all: readonly Trace[], width: number): string {
  const rows = [["hop", "address", ...all.map(({ mark }) => nameOf(mark))]], lines: string[] = [];
  const longest = all.reduce((a, b) => a.path.length < b.path.length ? b : a);
  for (const [at, { hop }] of longest.path.entries()) {
    const hops = all.map(({ path }) => path[at]), answered = hops.filter((hop) => hop?.address);
    const [address = "(no answer)", ...others] = new Set(answered.map(({ address }) => address!));
    const cells = hops.map((hop, column) => {
      if (!hop?.address) return "-";
      if (hop.tos === null) return hop.evidence === "icmp" ? "lower" : "?";
      const { mark } = all[column];
      return sameDscp(hop.tos, mark.tos) ? nameOf(mark) : `${nameOf(markOf(hop.tos))}!`;
    });
    const more = others.length > 0 ? ` +${others.length}` : "";
    rows.push([String(hop ?? "?").padStart(3), `${address}${more}`, ...cells]);
    if (answered.length === 0 || answered.length === hops.length) continue;
    lines.push(
      `Hop ${hop} (${address}) is partly silent: it answered ${answered.length} of ${hops.length} probes.`,
    );
  }
  const changed = all.flatMap(({ mark, path, changes }) =>
    changes.map((change) => ({ mark, place: placeOf(change, path), to: markOf(change.to) }))
  );
  for (const [place, here] of Map.groupBy(changed, ({ place }) => place)) {
    const words = [...Map.groupBy(here, ({ to }) => nameOf(to))].map(([to, marks]) =>
      `${marks.map(({ mark }) => nameOf(mark)).join(", ")} → ${to}`
    );
    lines.push(`B${place.slice(1)}: ${words.join("; ")}`);
  }
  for (const trace of all) {
    const { sort, text } = pathVerdict(trace);
    if (sort !== "changed" || trace.changes.length > 0) continue;
    lines.push(`${nameOf(trace.mark)} was ${text}.`);
  }
  const counts = [...Map.groupBy(all, (trace) => pathVerdict(trace).sort)].map(([sort, traces]) =>
    `${traces.length} ${sort}`
  );
  lines.push(`Of ${plural(all.length, "mark")}: ${counts.join(", ")}.`);
  const widths = rows[0].map((_, at) => Math.max(...rows.map((row) => row[at].length)) + 2);
  const isTable = all.length <= 8 && widths.reduce((sum, each) => sum + each) <= width + 2;
  const table = rows.map((row) =>
    row.map((cell, at) => cell.padEnd(widths[at])).join("").trimEnd()
  );
  return (isTable ? `${table.join("\n")}\n` : "") +
    lines.map((line) => wrapped(line, width)).join("");
}

/**
 * Traces the path with each mark, and prints the hops: those of a single mark as they answer.
 *
 * @returns the first failure, a wrong mark before others, or `null`
 */
async function traces(place: Place, options: Options): Promise<Failure | null> {
  const { marks } = options, isMany = marks.length > 1, width = widthOf(Deno.stdout);
  const askOptions = { ...await askOptionsOf(options), maxHops: options.maxHops };
  const route = { target: place.target, options: askOptions, sink: sinkFor(options) };
  using climb = await climbTo(place.target, askOptions, isMany);
  const all = marks.map((mark) => new Trace(mark, route, climb));
  const isQuiet = options.json || options.silent;
  using screen = new Screen(isMany && !isQuiet);
  let begun = 0;
  const result = (interrupted: Failure | null = null) => {
    screen.clear();
    if (options.json) {
      return all.slice(0, begun).map((trace, at) => {
        const failure = trace.failure ?? (at === begun - 1 ? interrupted : null);
        return json(place, trace.exchange, failure, 0, trace);
      }).join("");
    }
    const known = all.filter(({ path, exchange }) => path.length > 0 || exchange !== null);
    if (isMany) return known.length === 0 ? "" : marksReport(known, width);
    if (all[0].path.length === 0) return "";
    return wrapped(`${describe(marks[0])} was ${pathVerdict(all[0]).text}.`, width);
  };
  using _signals = onInterrupt(async (code) => {
    if (Deno.stderr.isTerminal()) toStandardError("\n");
    const current = all[begun - 1]?.exchange;
    if (current?.connection && current.left === NOT_OBSERVED) {
      current.left = judgeLeft(current.connection, current.mark);
    }
    // Standard output may have a reader that has stopped.
    const printing = toStandardOutput(result(new Failure(code, "interrupted"))).catch(() => {});
    await Promise.race([printing, pause(200)]);
    if (current?.connection && !isQuiet && !isMany) {
      toStandardError(report(current, place.isBuiltIn, false).join(""));
    }
    toStandardError("dscp-get: interrupted\n");
    Deno.exit(code);
  });
  for (const [done, trace] of all.entries()) {
    begun = done + 1;
    screen.offer(() => `${done} of ${all.length} marks, Ctrl-C ends it here\n`);
    for await (const _hop of trace) {
      if (!isMany && !options.json) await toStandardOutput(hopRow(trace, width));
    }
    if (done === 0) await checkPresent(trace.exchange!, place, options);
    // Without a permission or libc all others would fail the same way.
    if (trace.failure?.code === Exit.cannotRun) throw trace.failure;
  }
  if (isMany) await askAgain(climb, all, route);
  await toStandardOutput(result());
  if (!isQuiet && !isMany) toStandardError(report(all[0].exchange!, place.isBuiltIn).join(""));
  const isHidden = !climb.isExact && all[0].path.some(({ answer }) => answer === "time exceeded");
  if (!isQuiet && isHidden) {
    const way = "run as root, or sudo setcap cap_net_raw+ep on a copy of deno";
    lineToStandardError(`hint: to see the whole mark at routers on IPv4, ${way}`);
  }
  const failures = all.flatMap(({ failure }) => failure ?? []);
  const first = failures.reduce(graver, null);
  if (!isMany || first === null) return first;
  const count = `${failures.length} of ${all.length} marks changed or failed`;
  const which = first === failures[0] ? "the first" : "the first change";
  return new Failure(first.code, `${count}; ${which}: ${first.message}`);
}

/** Loads what climbs. @param many for several marks, one after the other */
async function climbTo({ host, port }: Target, options: AskOptions, many: boolean): Promise<Climb> {
  const { Climb } = await import("./ffi/path.ts");
  return new Climb({ hostname: host, port, family: options.family, many });
}

/** Asks the hops again that answered to some marks only, as long as a climb may take. */
async function askAgain(climb: Climb, all: readonly Trace[], { target, options }: Route) {
  const limits = new Limits({ ...options, maxTime: 0 });
  const signal = limits.begin({ ...target, isHttps: false });
  try {
    await climb.reprobe(all.map(({ mark, path }) => ({ tos: mark.tos, path })), signal);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
  } finally {
    limits.end();
  }
}

// ─── Far end ────────────────────────────────────────────────────────────────────────────────────

/** How a server answers and what it says of a connection. */
interface Service {
  readonly type: string;
  /** The body for a client, in ASCII. */
  page(peer: Deno.NetAddr, arrived: Arrived): string;
  /** Gets a line for each request. */
  log?(line: string): void;
}

const BUILT_IN: Service = {
  type: "text/plain; charset=utf-8",
  page: () =>
    wrapped(
      `This page comes from dscp-get's built-in server: nobody else was listening on \
port ${DEFAULT_PORT} here. Give a URL to ask another server; --help lists the options.`,
      widthOf(Deno.stdout),
    ),
};

/** A connection of the server: waiting for its head, or lingering after the answer. */
interface Client {
  readonly conn: Deno.TcpConn;
  /** When it began to wait, on the clock of `performance.now()`. */
  since: number;
  /** Whether it has sent some of its head. */
  hasBegun: boolean;
  isAnswered: boolean;
  /** Resolves when it has left. */
  gone: Promise<void>;
}

/** What the far end allows its clients. */
const ALLOWED = { connections: 1024, head: 16 * 1024, headSeconds: 10, lingerSeconds: 1 };
/** Once it is stopped, how long clients have to send their heads: those who have begun, and others. */
const LAST_SECONDS = { begun: 2, idle: 0.5 };

/** Answers what connects to a listener, until it is stopped. */
class FarEnd {
  /** Oldest first. */
  readonly #clients = new Set<Client>();
  #isStopped = false;

  constructor(
    private readonly listener: Deno.TcpListener,
    private readonly service: Service,
  ) {}

  /** Accepts clients until the listener is closed, and answers the last of them. */
  async serve(): Promise<void> {
    for (;;) {
      let conn: Deno.TcpConn;
      try {
        conn = await this.listener.accept();
      } catch (error) {
        const { BadResource, Interrupted } = Deno.errors;
        if (error instanceof BadResource || error instanceof Interrupted) break;
        // Another client must leave before there is room. All other errors are about a client that
        // had gone before it was accepted.
        const { code } = error as { code?: string };
        if (["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"].includes(code ?? "")) await pause(100);
        continue;
      }
      if (this.#clients.size >= ALLOWED.connections) this.#makeRoom();
      const since = performance.now(), gone = Promise.resolve();
      const client: Client = { conn, since, hasBegun: false, isAnswered: false, gone };
      this.#clients.add(client);
      client.gone = this.#answer(client);
    }
    await this.#allGone();
  }

  async #allGone(): Promise<void> {
    await Promise.all(Array.from(this.#clients, ({ gone }) => gone));
  }

  /** Answers one connection; a client's errors are ignored. */
  async #answer(client: Client): Promise<void> {
    const { conn } = client, service = this.service;
    try {
      const peer = plainEnd(conn.remoteAddr);
      const handshake = arrivedOn(conn);
      const request = await readRequest(client);
      if (request === null || client.isAnswered) return;
      client.isAnswered = true;
      client.since = performance.now();
      // The request is here, so on IPv6 the latest packet is one of its own.
      const arrived = { ...handshake, data: arrivedOn(conn).data };
      const strongest = arrived.data ?? arrived.syn ?? arrived.ack;
      if (strongest) setTos(conn, markOf(strongest).tos); // 0 is what it has
      let reply: Uint8Array = replyOf(request, service, { peer, arrived });
      while (reply.length > 0) reply = reply.subarray(await conn.write(reply));
      service.log?.(logLine(peer, request, arrived));
      if (!request.hasMore) return;
      // Closing with unread data sends an RST, which can discard the reply.
      await conn.closeWrite();
      const rest = new Uint8Array(ALLOWED.head);
      while (await conn.read(rest) !== null);
    } catch {
      /* the client is gone */
    } finally {
      this.#drop(client);
    }
  }

  #drop(client: Client): void {
    // What was read just now must not be answered: the descriptor may be another's soon.
    client.isAnswered = true;
    this.#clients.delete(client);
    try {
      client.conn.close();
    } catch { /* it is closed already */ }
  }

  /** Drops the client that has waited longest without sending a whole head, or else the oldest. */
  #makeRoom(): void {
    let oldest: Client | undefined;
    for (const client of this.#clients) {
      oldest ??= client;
      if (!client.isAnswered) return this.#drop(client);
    }
    this.#drop(oldest!);
  }

  /** Ends what takes too long; to be called a few times a second. */
  sweep(): void {
    const now = performance.now();
    for (const client of this.#clients) {
      const seconds = (now - client.since) / 1000;
      if (client.isAnswered && seconds > ALLOWED.lingerSeconds) this.#drop(client);
      const allowed = !this.#isStopped
        ? ALLOWED.headSeconds
        : client.hasBegun
        ? LAST_SECONDS.begun
        : LAST_SECONDS.idle;
      if (!client.isAnswered && seconds > allowed) {
        client.since = now;
        client.isAnswered = true;
        const reply = replyOf({ status: 408 }, this.service, null);
        client.conn.write(reply).catch(() => {}).then(() => this.#drop(client));
      }
    }
  }

  /** Accepts nobody else; those who have not sent their head have {@linkcode LAST_SECONDS}. */
  stop(): void {
    this.listener.close();
    this.#isStopped = true;
    const now = performance.now();
    for (const client of this.#clients) if (!client.isAnswered) client.since = now;
  }

  /** Stops and does not wait for anybody who is slow. */
  async close(): Promise<void> {
    this.listener.close();
    if (this.#clients.size > 0) await Promise.race([this.#allGone(), pause(100)]);
    for (const client of this.#clients) this.#drop(client);
  }
}

function logLine(peer: Deno.NetAddr, request: ParsedRequest, arrived: Arrived): string {
  const { method = "-", path = "-", status } = request;
  const marks = Object.entries(arrived).map(([packet, tos]) =>
    `${packet} ${tos === null ? "-" : hex(tos)}`
  );
  const line = printable(`${method} ${path}`.slice(0, 200));
  return `${formatAddress(peer)} ${line} ${status} ${marks.join(" ")}`;
}

const UNKNOWN: Arrived = { syn: null, ack: null, data: null };

/** What the kernel reports of a connection; nothing if another one has the same ends. */
function arrivedOn(conn: Deno.TcpConn): Arrived {
  try {
    return readArrived(conn);
  } catch (error) {
    if (error instanceof DescriptorError) return UNKNOWN;
    throw error;
  }
}

/** A request as far as the far end looks at it. */
interface ParsedRequest {
  readonly status: number;
  readonly method?: string;
  readonly path?: string;
  /** More is to come, or has come, than was read. */
  readonly hasMore?: boolean;
}

const STATUS: Record<number, string> = {
  200: "OK",
  400: "Bad Request",
  405: "Method Not Allowed",
  408: "Request Timeout",
  431: "Request Header Fields Too Large",
};

/** Reads the head of a request; `null` if the client sends nothing. */
async function readRequest(client: Client): Promise<ParsedRequest | null> {
  const buffer = new Uint8Array(1024);
  let text = "", end = 0;
  while (end === 0 && text.length <= ALLOWED.head) {
    const size = await client.conn.read(buffer);
    if (size === null) break;
    client.hasBegun = true;
    // The blank line may lie across reads.
    const blank = /\n\r?\n/g;
    blank.lastIndex = Math.max(0, text.length - 2);
    text += latin1(buffer.subarray(0, size));
    if (blank.test(text)) end = blank.lastIndex;
    // A TLS handshake record, by somebody who means https
    if (text.startsWith("\x16")) break;
  }
  if (text === "") return null;
  const head = text.slice(0, end || text.length);
  const [, method, path] = /^(?:\r?\n)?([!-~]+) ([!-~]+) HTTP\/1\.\d\r?\n/.exec(head) ?? [];
  if (head.length > ALLOWED.head) return { status: 431, method, path, hasMore: true };
  if (method === undefined || end === 0) return { status: 400, method, path, hasMore: true };
  if (method !== "GET" && method !== "HEAD") return { status: 405, method, path, hasMore: true };
  const hasMore = text.length > end || /^(content-length|transfer-encoding):/mi.test(head);
  return { status: 200, method, path, hasMore };
}

const encoder = new TextEncoder();

function replyOf(
  { status, method }: ParsedRequest,
  service: Service,
  seen: { peer: Deno.NetAddr; arrived: Arrived } | null,
): Uint8Array<ArrayBuffer> {
  const isOk = status === 200 && seen !== null;
  const body = isOk ? service.page(seen.peer, seen.arrived) : `${STATUS[status]}\n`;
  const { syn = null, ack = null, data = null } = seen?.arrived ?? {};
  const byteText = (tos: number | null) => tos === null ? null : hex(tos);
  const headers: Header[] = [
    ["Server", `dscp-get/${VERSION}`],
    ["Allow", status === 405 ? "GET, HEAD" : null],
    ["Content-Type", isOk ? service.type : "text/plain; charset=utf-8"],
    ["Content-Length", String(body.length)],
    ["Arrived-ToS", byteText(data ?? syn ?? ack)],
    ["Arrived-SYN", byteText(syn)],
    ["Arrived-ACK", byteText(ack)],
    ["Arrived-Data", byteText(data)],
    ["Arrived-Peer", seen === null ? null : formatAddress(seen.peer)],
    ["Connection", "close"],
  ];
  let text = `HTTP/1.1 ${status} ${STATUS[status]}\r\n`;
  for (const [name, value] of headers) if (value !== null) text += `${name}: ${value}\r\n`;
  return encoder.encode(`${text}\r\n${method === "HEAD" ? "" : body}`);
}

/** `--serve`: the far end, until SIGINT or SIGTERM. */
async function serveUntilSignal(
  where: { hostname: string; port: number },
  isSilent: boolean,
): Promise<void> {
  let listener: Deno.TcpListener;
  try {
    listener = Deno.listen(where);
    keepArrivals(listener);
  } catch (error) {
    throw failureOf(error, "listening", where);
  }
  const log = isSilent ? null : new Log();
  const farEnd = new FarEnd(listener, {
    type: "application/json",
    page: ({ hostname, port }, arrived) =>
      JSON.stringify({ peer: { address: hostname, port }, ...arrived }) + "\n",
    log: log === null ? undefined : (line) => log.add(line),
  });
  const sweeping = setInterval(() => farEnd.sweep(), 200);
  using _signals = onInterrupt(() => farEnd.stop());
  log?.add(`listening on ${formatAddress(listener.addr)}; Ctrl-C ends it`);
  await farEnd.serve();
  clearInterval(sweeping);
  // The second signal ends it also while the log waits for its reader.
  await Promise.race([log?.written, pause(200)]);
}

/** Logs without waiting for a slow reader: lines that do not fit are counted instead. */
class Log {
  /** Resolves when all lines so far are written, or nobody is there to read them. */
  written: Promise<void> = Promise.resolve();
  #waiting = "";
  #dropped = 0;
  #isWriting = false;

  /** Adds a line, without its end. */
  add(line: string): void {
    const MOST_WAITING = 64 * 1024;
    if (this.#waiting.length > MOST_WAITING || this.#dropped > 0) this.#dropped++;
    else this.#waiting += `${line}\n`;
    if (!this.#isWriting) this.written = this.#write();
  }

  async #write(): Promise<void> {
    this.#isWriting = true;
    try {
      // A parent may have made it non-blocking, where Deno does not say how much it has written.
      makeBlocking(2);
      while (this.#waiting !== "" || this.#dropped > 0) {
        if (this.#waiting === "") {
          this.#waiting = `… ${plural(this.#dropped, "line")} dropped\n`;
          this.#dropped = 0;
        }
        let bytes: Uint8Array = new TextEncoder().encode(this.#waiting);
        this.#waiting = "";
        while (bytes.length > 0) bytes = bytes.subarray(await Deno.stderr.write(bytes));
      }
    } catch { /* standard error is closed */ }
    this.#isWriting = false;
  }
}

/** Where requests go: an existing server, or one of our own that is closed with the place. */
interface Place extends AsyncDisposable {
  readonly target: Target;
  readonly isBuiltIn: boolean;
}

/** Thrown when the default port's server has gone, or will soon: this listener takes its place. */
class Vacant {
  constructor(readonly listener: Deno.TcpListener) {}
}

/** @throws {Vacant} without a URL, if the first exchange shows that the server does not stay */
async function checkPresent(
  exchange: Exchange,
  { isBuiltIn }: Place,
  options: Options,
  limits?: Limits,
): Promise<void> {
  if (options.url !== null || isBuiltIn) return;
  const { target: { host, port }, reply, failure } = exchange;
  // The built-in server of another run ends with that run.
  const isOthers = isOurs(reply) && reply?.status === 200 &&
    reply.headers.some(([, value]) => value === BUILT_IN.type);
  const allPorts = formatAddress({ hostname: host, port }).replace(/:\d+$/, "");
  if (isOthers && isSeries(options) && isGranted({ name: "net", host: allPorts })) {
    throw new Vacant(Deno.listen({ hostname: host, port: 0 }));
  }
  const codes: number[] = [Exit.cannotConnect, Exit.emptyReply, Exit.connectionLost];
  if (reply !== null || !codes.includes(failure?.code ?? 0)) return;
  // Concurrent runs may take the port one after another, each for some milliseconds.
  for (let tries = 0; tries < 100 && !limits?.stopped; tries++) {
    const listener = listen(host, port);
    if (listener !== null) throw new Vacant(listener);
    await pause(10);
  }
}

/** A server in this process. */
function builtInServer(listener: Deno.TcpListener): Place {
  keepArrivals(listener);
  const farEnd = new FarEnd(listener, BUILT_IN);
  const serving = farEnd.serve();
  return {
    target: localTarget(listener.addr.hostname, listener.addr.port),
    isBuiltIn: true,
    async [Symbol.asyncDispose]() {
      await farEnd.close();
      await serving;
    },
  };
}

/** A listener of our own; `null` if somebody has the port. */
function listen(hostname: string, port: number): Deno.TcpListener | null {
  try {
    return Deno.listen({ hostname, port });
  } catch (error) {
    if (error instanceof Deno.errors.AddrInUse) return null;
    throw failureOf(error, "listening", { hostname, port });
  }
}

// ─── Main ───────────────────────────────────────────────────────────────────────────────────────

/** Runs the script. @returns the exit code */
export async function main(args: readonly string[]): Promise<number> {
  let failure: Failure | null = null;
  try {
    const options = parseArguments(args);
    if (options.print === "help") await toStandardOutput(usage(widthOf(Deno.stdout)));
    else if (options.print === "version") await toStandardOutput(`dscp-get ${VERSION}\n`);
    else if (options.print !== null) await toStandardOutput(completions(options.print));
    else failure = await run(options);
  } catch (error) {
    failure = failureOf(error);
    if (args.includes("--json") && failure.code !== Exit.cannotWrite) {
      await toStandardOutput(json(null, null, failure)).catch(() => {});
    }
  }
  if (failure !== null && failure.message !== "") {
    lineToStandardError(`dscp-get: ${failure.message}`);
    if (failure.hint !== undefined) lineToStandardError(`hint: ${failure.hint}`);
  }
  return failure?.code ?? Exit.ok;
}

/** Serves, traces, or makes one request or many; without a URL at the default port's server. */
async function run(options: Options): Promise<Failure | null> {
  const isDefault = options.url === null;
  const target = isDefault
    ? localTarget(options.family === 6 ? "::1" : DEFAULT_HOST, DEFAULT_PORT)
    : parseTarget(options.url!);
  const where = options.serve ?? { hostname: target.host, port: target.port };
  // On a terminal Deno would ask for what is missing, and wait for an answer.
  const missing = Deno.stdin.isTerminal() ? missingPermission(where) : null;
  if (missing !== null) throw missing;
  if (options.serve !== null) return await serveUntilSignal(options.serve, options.silent), null;
  const request = options.trace ? traces : isSeries(options) ? series : single;
  // If nothing listens on the default port, or the server there is gone, we answer ourselves.
  let listener = isDefault ? listen(target.host, target.port) : null;
  for (;;) {
    await using place = listener === null
      ? { target, isBuiltIn: false, async [Symbol.asyncDispose]() {} }
      : builtInServer(listener);
    try {
      return await request(place, options);
    } catch (error) {
      if (!(error instanceof Vacant)) throw error;
      listener = error.listener;
    }
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
