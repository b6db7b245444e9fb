/**
 * The step of the GitHub action: runs `main.ts --json` with the action's inputs, writes outputs,
 * an annotation and a summary, and exits with its code.
 *
 * The inputs and the server's reply are untrusted: they reach the script only as arguments, and the
 * runner and Markdown only escaped.
 *
 * @module
 */

import { describe, hex, type Mark } from "../../../ffi/mod.ts";
import { Exit } from "../../../main.ts";
import { printable } from "../../../src/text.ts";

/** One line of `main.ts --json`, as far as it is used here; parts are `null` if they are unknown. */
interface Result {
  mark: Mark & { handshake: boolean };
  expect?: Mark;
  sent: { proved: boolean | null; packets: { tos: number }[] };
  arrived: Record<string, number | null> | null;
  reply: { status: number; reason: string; bodyBytes: number } | null;
  milliseconds: { total: number | null };
  error?: { message: string };
}

function input(name: string): string {
  return Deno.env.get(`DSCP_GET_${name}`)?.trim() ?? "";
}

/** A switch, if the input of its name is true. @throws the input is neither true nor false */
function whether(name: string, option: string): string[] {
  const value = input(name).toLowerCase();
  if (value === "true") return [option];
  if (value === "false" || value === "") return [];
  throw new Error(`${option.slice(2)} must be true or false, not '${printable(value)}'`);
}

/** The arguments of `main.ts`. @throws an input is none */
function argumentsOfInputs(): string[] {
  const dscp = input("DSCP"), expect = input("EXPECT"), url = input("URL");
  const more = input("ARGUMENTS").split("\n").map((line) => line.trim());
  const two = more.find((line) => /^(--[\w-]+|-\w)\s/.test(line));
  if (two !== undefined) {
    throw new Error(`arguments must have one argument a line, and '${printable(two)}' is two`);
  }
  return [
    "--json",
    ...dscp === "" ? [] : [`--dscp=${dscp}`],
    ...expect === "" ? [] : [`--expect=${expect}`],
    ...whether("MARK_SYN", "--mark-syn"),
    ...whether("REQUIRE_PROOF", "--require-proof"),
    ...more.filter((line) => line !== ""),
    ...url === "" ? [] : ["--", url],
  ];
}

/** Runs `main.ts` to its end. */
async function dscpGet(args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const script = new URL("../../../main.ts", import.meta.url).href;
  // --allow-read is for --cacert.
  const deno = "run --no-prompt --allow-net --allow-ffi --allow-read".split(" ");
  const command = new Deno.Command(Deno.execPath(), {
    args: [...deno, script, ...args],
    env: { NO_COLOR: "1" },
    stdin: "null",
  });
  const { code, stdout, stderr } = await command.output();
  const decoder = new TextDecoder();
  return { code, stdout: decoder.decode(stdout), stderr: decoder.decode(stderr) };
}

/** A line of JSON, or `null` for another line. */
function parseLine(line: string): Partial<Result> | null {
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
}

/** The requests among the lines of JSON. */
function parseResults(stdout: string): Result[] {
  const results = stdout.split("\n").map(parseLine);
  return results.filter((result) => result?.mark !== undefined) as Result[];
}

/** Whether all packets left with their marks: `true`, `false` or `unknown`. */
function provedOf(results: readonly Result[]): string {
  if (results.some(({ sent }) => sent.proved === false)) return "false";
  const isProved = results.length > 0 && results.every(({ sent }) => sent.proved);
  return isProved ? "true" : "unknown";
}

/** A row of the table: set, sent, arrived, reply, time. */
function rowOf({ mark, expect, sent, arrived, reply, milliseconds: { total } }: Result): string[] {
  const seen = [...new Set(sent.packets.map(({ tos }) => hex(tos)))].join(" and ");
  const verdict = { true: "proved", false: "NOT the mark", null: "not proved" }[`${sent.proved}`];
  const reported = ["syn", "ack", "data"].map((what) => [what, arrived?.[what] ?? null] as const)
    .filter(([, tos]) => tos !== null);
  return [
    describe(mark) + (mark.handshake ? ", from the SYN on" : "") +
    (expect === undefined ? "" : `, to arrive as ${describe(expect)}`),
    seen === "" ? "not observed" : `${seen}: ${verdict}`,
    reported.map(([what, tos]) => `${what} ${hex(tos!)}`).join(", ") || "not reported",
    reply === null
      ? "none"
      : `${reply.status} ${reply.reason}, ${reply.bodyBytes} byte${
        reply.bodyBytes === 1 ? "" : "s"
      }`,
    total === null ? "" : `${total.toFixed(1)} ms`,
  ];
}

// ─── Untrusted text ─────────────────────────────────────────────────────────────────────────────

/** One line of about 300 characters at most, without control characters. */
function line(text: string): string {
  return printable(text.length > 300 ? `${text.slice(0, 300)}…` : text);
}

/** Text for Markdown, in which nothing is markup: every punctuation mark becomes an entity. */
function markdown(text: string): string {
  return line(text).replace(/[!-/:-@[-`{-~]/g, (c) => `&#${c.charCodeAt(0)};`);
}

/** The data of a workflow command. */
function commandData(text: string): string {
  return text.replaceAll("%", "%25").replaceAll("\r", "%0D").replaceAll("\n", "%0A");
}

/** Prints to the log; what looks like a workflow command in the text is not one. */
function log(text: string): void {
  const token = crypto.randomUUID();
  print(`::stop-commands::${token}\n${text.trimEnd()}\n::${token}::\n`);
}

function print(text: string): void {
  let bytes = new TextEncoder().encode(text);
  while (bytes.length > 0) bytes = bytes.subarray(Deno.stdout.writeSync(bytes));
}

// A job may have outputs of 1 MiB in UTF-16; a step with more fails. This is a quarter of it.
const MAX_OUTPUT = 131_072;

// ─── What the runner reads ──────────────────────────────────────────────────────────────────────

/** Appends to the file that a variable of the runner names. */
function append(variable: string, text: string): void {
  const file = Deno.env.get(variable);
  if (file) Deno.writeTextFileSync(file, text, { append: true });
}

function setOutput(name: string, value: string): void {
  const end = crypto.randomUUID();
  append("GITHUB_OUTPUT", `${name}<<${end}\n${value}\n${end}\n`);
}

/** The results as an output: all of them in a file, and as many as an output may have. */
function setResults(stdout: string): void {
  const lines = stdout.trimEnd().split("\n");
  const file = Deno.makeTempFileSync({
    dir: Deno.env.get("RUNNER_TEMP") || undefined,
    prefix: "dscp-get-",
    suffix: ".jsonl",
  });
  Deno.writeTextFileSync(file, stdout);
  setOutput("json-file", file);
  setOutput("json", shortened(lines).join("\n"));
}

/**
 * Lines of JSON of at most {@linkcode MAX_OUTPUT} characters in all: if there are more, the first
 * that tell of a failure, and the summary at the end.
 */
export function shortened(lines: readonly string[]): string[] {
  const isShort = lines.join("\n").length <= MAX_OUTPUT;
  if (isShort) return [...lines];
  let room = MAX_OUTPUT;
  const fits = (line: string) => (room -= line.length + 1) >= 0;
  const summary = lines.slice(-1).filter(fits);
  const failures = lines.slice(0, -1).filter((line) => parseLine(line)?.error !== undefined);
  const end = failures.findIndex((line) => !fits(line));
  return [...failures.slice(0, end < 0 ? undefined : end), ...summary];
}

/** The page of the run gets a table. */
function summarize(results: readonly Result[], message: string): void {
  const max = 100;
  const table = [["set", "sent", "arrived", "reply", "time"], Array(5).fill("---")]
    .concat(results.slice(0, max).map((result) => rowOf(result).map(markdown)))
    .map((cells) => `| ${cells.join(" | ")} |\n`);
  const rest = results.length > max ? `\nThe first ${max} of ${results.length} requests.\n` : "";
  const rows = results.length > 0 ? `${table.join("")}${rest}\n` : "";
  append("GITHUB_STEP_SUMMARY", `**dscp-get** ${markdown(message)}\n\n${rows}`);
}

/** What the annotation says. */
function messageOf(code: number, results: readonly Result[], stderr: string): string {
  if (code === Exit.ok) {
    const [set, sent, arrived, reply, time] = rowOf(results[0]);
    const one = `set ${set}; sent ${sent}; arrived ${arrived}; reply ${reply} in ${time}`;
    return results.length === 1 ? one : `${results.length} requests, the first: ${one}`;
  }
  const error = results.find(({ error }) => error !== undefined)?.error?.message ??
    /^dscp-get: (.*)$/m.exec(stderr)?.[1] ?? stderr.trim();
  return `${error} (exit ${code})`;
}

async function main(): Promise<number> {
  let { code, stdout, stderr } = { code: Exit.usage as number, stdout: "", stderr: "" };
  try {
    ({ code, stdout, stderr } = await dscpGet(argumentsOfInputs()));
    log(stderr + stdout);
  } catch (error) {
    stderr = (error as Error).message;
  }
  const results = parseResults(stdout);
  if (code === Exit.ok && results.length === 0) {
    code = Exit.usage;
    stderr = "no result: the arguments ask for something else than a request";
  }
  const message = line(messageOf(code, results, stderr));
  setOutput("proved", provedOf(results));
  setOutput("exit-code", `${code}`);
  setResults(stdout);
  summarize(results, message);
  print(`::${code === Exit.ok ? "notice" : "error"} title=dscp-get::${commandData(message)}\n`);
  return code;
}

if (import.meta.main) Deno.exit(await main());
