/**
 * What marking and proving cost, next to other programs. Most rows are ratios, because absolute times
 * drift with the machine. A row with a limit shows whether the figure is within it.
 *
 * ```sh
 * deno task bench                # everything, some minutes
 * deno task bench --runs 10      # fewer runs
 * deno task bench --only process # one part; --help names them
 * deno task bench --json         # for machines
 * ```
 *
 * Port 8086 must be free. nginx serves there, or Python if there is no nginx. `NODE` and `CURL` in the
 * environment name the Node and the curl to compare with. `ab` comes from apache2-utils.
 *
 * @module
 */

import { parseArgs } from "node:util";
import { dial } from "../ffi/mod.ts";
import { quantile } from "../src/statistics.ts";
import { Chain, CHAIN_SERVER } from "./support/namespaces.ts";
import { Background, cpuTicks, execute, MAIN, missing } from "./support/processes.ts";
import { Certificates, FarEnd, startNginx } from "./support/servers.ts";

// ─── Limits ──────────────────────────────────────────────────────────────────────────────────────

/** The most that each figure should be; the other figures have no limit. */
const LIMITS: Record<string, number> = {
  "plain run / bare Deno.connect": 1.75,
  "typical run / bare Deno.connect": 1.65,
  "--mark-syn / bare Deno.connect": 1.85,
  "typical run / Deno fetch": 1,
  "marking alone, 20 sockets": 30,
  "marking alone, 10,000 / 20 sockets": 1.5,
  "1 GiB, ours / curl": 0.9,
  "peak memory above a small reply's": 16,
  "a million chunks, ours / curl": 3,
  "-n 10000 / bare unmarked loop": 1.35,
  "memory after 10,000 above that after 100": 8,
  "first request of an https series / median of 20": 5,
  "Deno.serve / --serve -s": 1.25,
  "memory of --serve after the runs": 100,
  "--serve with slow clients: processor": 10,
  "--serve with slow clients: memory added": 16,
  "--serve with slow clients: p99 of a reply": 50,
  "1,000 dials / 1,000 Deno.connect": 1.1,
  "a file read beside 1,000 dials": 50,
  "of 200 runs on an idle path, -n 50": 1,
  "of 20 runs on an idle path, -n 5000": 0,
  "--trace / an empty Deno script": 2,
  "64 marks over three routers": 3,
  "lines of main.ts": 350,
  "lines of the largest file of src/ and ffi/": 450,
  "lines of main.ts + src/ + ffi/": 7950,
};

// ─── Programs ────────────────────────────────────────────────────────────────────────────────────

const SITE = "http://127.0.0.1:8086/";
const GET = "GET / HTTP/1.1\r\nHost: 127.0.0.1:8086\r\nConnection: close\r\n\r\n";

const CONNECT = `const conn = await Deno.connect({ hostname: "127.0.0.1", port: 8086 });
`;

const EXCHANGE = `await conn.write(new TextEncoder().encode(${JSON.stringify(GET)}));
const buffer = new Uint8Array(65536);
for (let size; (size = await conn.read(buffer)) !== null;) {
  await Deno.stdout.write(buffer.subarray(0, size));
}
conn.close();
export {};
`;

/** Scripts to compare with, each the shortest that does the work. */
const SCRIPTS: Record<string, string> = {
  "bare.ts": CONNECT + EXCHANGE,

  "naive.ts": `${CONNECT}const { symbols: libc } = Deno.dlopen("libc.so.6", {
  getsockname: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
});
const address = new Uint8Array(28), length = new Uint32Array([28]);
const { port } = conn.localAddr as Deno.NetAddr;
for (let fd = 3; fd < 100; fd++) {
  if (libc.getsockname(fd, address, length) !== 0) continue;
  if ((address[2] << 8 | address[3]) !== port) continue;
  libc.setsockopt(fd, 0, 1, new Int32Array([0xb8]), 4);
  break;
}
${EXCHANGE}`,

  "fetch.ts": `const reply = await fetch("${SITE}");
await Deno.stdout.write(await reply.bytes());
export {};
`,

  "empty.ts": "export {};\n",

  "load.ts": `import "${MAIN}";\n`,

  "loop.ts": `const request = new TextEncoder().encode(${JSON.stringify(GET)});
const buffer = new Uint8Array(65536);
for (let left = Number(Deno.args[0]); left > 0; left--) {
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: Number(Deno.args[1]) });
  await conn.write(request);
  while (await conn.read(buffer) !== null);
  conn.close();
}
export {};
`,

  "serve.ts": `const [port, body, headers] = Deno.args;
const init = { headers: JSON.parse(headers) };
const where = { hostname: "127.0.0.1", port: Number(port), onListen() {} };
Deno.serve(where, () => new Response(body, init));
`,

  "node.mjs": `import net from "node:net";
// Older ones ignore typeOfService. Deno runs itself as "node" if there is no other.
if (parseInt(process.versions.node) < 26 || process.versions.deno) process.exit(1);
const socket = net.connect({ host: "127.0.0.1", port: 8086, typeOfService: 0xb8 });
socket.end(${JSON.stringify(GET)});
socket.pipe(process.stdout);
`,

  "get.py": `import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", 8086)
connection.request("GET", "/")
sys.stdout.buffer.write(connection.getresponse().read())
`,
};

const NODE = Deno.env.get("NODE") ?? "node";
const CURL = Deno.env.get("CURL") ?? "curl";
const PYTHON = "/usr/bin/python3"; // the one in the path may be a slow script that looks for another

const deno = (...words: string[]) => [Deno.execPath(), "run", "--no-prompt", ...words];
const dscpGet = (...args: string[]) => deno("--allow-net", "--allow-ffi", MAIN, ...args);
const sendGet = (command: string) => ["sh", "-c", `printf ${JSON.stringify(GET)} | ${command}`];

/** Our own runs, and what Deno takes before our code runs. */
const OURS: Record<string, string[]> = {
  "plain run": dscpGet(),
  "typical run": dscpGet("-d", "EF", "--json", SITE),
  "--mark-syn": dscpGet("--mark-syn"),
  "an empty script": deno("empty.ts"),
  "our modules, not run": deno("load.ts"),
};

const RUNS = ["plain run", "typical run", "--mark-syn"];

/** The programs to compare with, if they are installed, and the runs of ours to compare with each. */
const RIVALS: { name: string; words: string[]; ours: string[] }[] = [
  { name: "bare Deno.connect", words: deno("--allow-net", "bare.ts"), ours: Object.keys(OURS) },
  { name: "Deno fetch", words: deno("--allow-net", "fetch.ts"), ours: RUNS },
  {
    name: "a naive marked script",
    words: deno("--allow-net", "--allow-ffi", "naive.ts"),
    ours: RUNS,
  },
  { name: "Node 26 typeOfService", words: [NODE, "node.mjs"], ours: ["plain run", "--mark-syn"] },
  { name: "unmarked curl", words: [CURL, "-s", SITE], ours: ["plain run"] },
  { name: "curl --ip-tos", words: [CURL, "-s", "--ip-tos", "EF", SITE], ours: ["plain run"] },
  { name: "Python http.client", words: [PYTHON, "get.py"], ours: ["plain run"] },
  { name: "nc -T 0xb8", words: sendGet("nc -T 0xb8 127.0.0.1 8086"), ours: ["plain run"] },
  {
    name: "socat tos=184",
    words: sendGet("socat - TCP:127.0.0.1:8086,tos=184"),
    ours: ["plain run"],
  },
];

/** What prints each program's version. */
const VERSIONS: Record<string, string[]> = {
  Python: [PYTHON, "--version"],
  curl: [CURL, "--version"],
  nc: ["nc", "-h"],
  socat: ["socat", "-V"],
  nginx: ["nginx", "-v"],
  ab: ["ab", "-V"],
};

// ─── Measuring ───────────────────────────────────────────────────────────────────────────────────

/** Runs a program to its end. @throws {Error} it failed */
async function run(words: readonly string[]): Promise<{ stdout: string; stderr: string }> {
  const process = new Deno.Command(words[0], { args: words.slice(1), stdin: "null" });
  const { code, stdout, stderr } = await process.output();
  const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (code !== 0) throw new Error(`${words.join(" ")}: exit ${code}: ${err}`);
  return { stdout: out, stderr: err };
}

/** Whether a program is installed and succeeds. */
async function works(words: readonly string[]): Promise<boolean> {
  try {
    await run(words);
    return true;
  } catch {
    return false;
  }
}

/** The times of several programs in milliseconds, run in turn, after three runs that do not count. */
async function alternate(
  programs: Record<string, readonly string[]>,
  runs: number,
): Promise<Record<string, number[]>> {
  const times: Record<string, number[]> = {};
  for (const name of Object.keys(programs)) times[name] = [];
  for (let round = -3; round < runs; round++) {
    for (const [name, words] of Object.entries(programs)) {
      const started = performance.now();
      await run(words);
      if (round >= 0) times[name].push(performance.now() - started);
    }
  }
  return times;
}

const median = (values: readonly number[]) => quantile(values, 0.5);

/** The median of the ratios of runs that came one after the other. */
function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, at) => value / theirs[at]));
}

/** A program with its output read by `cat`; fails if the program does. */
function toPipe(words: readonly string[]): string[] {
  const quoted = words.map((word) => `'${word}'`).join(" ");
  return ["bash", "-c", `set -o pipefail; ${quoted} | cat > /dev/null`];
}

/** A field of `/proc/PID/status` in MiB, see proc(5); 0 if the process has ended. */
function memory(pid: number, field: "VmRSS" | "VmHWM" | "RssAnon"): number {
  try {
    const status = Deno.readTextFileSync(`/proc/${pid}/status`);
    return Number(new RegExp(`${field}:\\s+(\\d+)`).exec(status)?.[1] ?? 0) / 1024;
  } catch {
    return 0;
  }
}

/** The most memory that a program held, in MiB, by the kernel's count. */
async function peakMemory(words: readonly string[]): Promise<number> {
  const [program, ...args] = words;
  const output = { stdin: "null", stdout: "piped", stderr: "null" } as const;
  const child = new Deno.Command(program, { args, ...output }).spawn();
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, memory(child.pid, "VmHWM")), 1);
  await child.stdout.pipeTo(new WritableStream());
  await child.status;
  clearInterval(timer);
  return peak;
}

/** Answers each connection with these bytes until the listener is closed. */
async function answer(
  listener: Deno.TcpListener,
  reply: Uint8Array,
  onReply: (count: number) => void = () => {},
): Promise<void> {
  const buffer = new Uint8Array(4096);
  let count = 0;
  for await (const conn of listener) {
    await conn.read(buffer);
    for (let sent = 0; sent < reply.length;) sent += await conn.write(reply.subarray(sent));
    conn.close();
    onReply(++count);
  }
}

// ─── Output ──────────────────────────────────────────────────────────────────────────────────────

interface Figure {
  readonly question: string;
  readonly name: string;
  readonly value: number;
  readonly unit: string;
  readonly detail: string;
  /** The most that it should be, or `null`. */
  readonly limit: number | null;
}

const figures: Figure[] = [];
let isJson = false;

function print(text: string): void {
  Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));
}

function say(text: string): void {
  if (!isJson) print(text);
}

function show(question: string, name: string, value: number, unit: string, detail = ""): void {
  const limit = LIMITS[name] ?? null;
  figures.push({ question, name, value, unit, detail, limit });
  const number = (Number.isInteger(value) ? String(value) : value.toFixed(2)).padStart(7);
  const verdict = limit === null ? "" : `${value <= limit ? "≤" : "over"} ${limit}`;
  say(`  ${number} ${unit.padEnd(3)} ${verdict.padEnd(9)} ${name.padEnd(40)} ${detail}`.trimEnd());
}

// ─── Questions ───────────────────────────────────────────────────────────────────────────────────

async function wholeProcess(runs: number): Promise<void> {
  say(`Whole process, a small reply: median ratio of ${runs} runs in turn`);
  const programs = { ...OURS };
  const found: typeof RIVALS = [], absent: string[] = [];
  for (const rival of RIVALS) {
    if (await works(rival.words)) {
      found.push(rival);
      programs[rival.name] = rival.words;
    } else absent.push(rival.name);
  }
  const times = await alternate(programs, runs);
  for (const { name: rival, ours } of found) {
    for (const name of ours) {
      const [a, b] = [times[name], times[rival]];
      const detail = `${median(a).toFixed(1)} / ${median(b).toFixed(1)} ms`;
      show("process", `${name} / ${rival}`, ratio(a, b), "×", detail);
    }
  }
  if (absent.length > 0) say(`  not installed or too old: ${absent.join(", ")}`);
}

/** A benchmark in the output of `deno bench --json`. */
interface Benched {
  readonly name: string;
  readonly results: readonly { readonly ok?: { readonly n: number; readonly p75: number } }[];
}

/** Marking alone or proof alone, which mark_bench.ts measures. */
async function alone(question: "mark" | "proof"): Promise<void> {
  const what = {
    mark: "Marking alone: find the descriptor, set the mark, read it back",
    proof: "Proof alone: ask for copies of sent packets; take and parse one",
  };
  say(`${what[question]} (p75)`);
  const file = new URL("mark_bench.ts", import.meta.url).pathname;
  const flags = ["--quiet", "--json", "--allow-all", "--no-check", `--filter=${question}`];
  const { stdout } = await run([Deno.execPath(), "bench", ...flags, file]);
  const times: Record<string, number> = {};
  for (const { name, results: [{ ok }] } of JSON.parse(stdout).benches as Benched[]) {
    if (ok === undefined) {
      say(`  not measured: ${name}; ulimit -n may be too low`);
      continue;
    }
    times[name] = ok.p75 / 1000;
    show(question, name, times[name], "µs", `${ok.n} times`);
  }
  const [few, many] = [times["marking alone, 20 sockets"], times["marking alone, 10,000 sockets"]];
  if (few && many) show(question, "marking alone, 10,000 / 20 sockets", many / few, "×");
}

async function largeBody(runs: number): Promise<void> {
  say(`1 GiB to a pipe: median ratio of ${runs} runs in turn`);
  const url = `${SITE}large`;
  if (await works([CURL, "--version"])) {
    const programs = { ours: toPipe(dscpGet("-s", url)), curl: toPipe([CURL, "-s", url]) };
    const { ours, curl } = await alternate(programs, runs);
    const [a, b] = [ours, curl].map((times) => (1024 / (median(times) / 1000)).toFixed(0));
    show("body", "1 GiB, ours / curl", ratio(ours, curl), "×", `${a} / ${b} MiB/s`);
  } else say("  not measured, as curl is missing: 1 GiB, ours / curl");
  const large = await peakMemory(dscpGet("-s", url));
  const small = await peakMemory(dscpGet("-s", SITE));
  const detail = `${large.toFixed(0)} MiB in all`;
  show("body", "peak memory above a small reply's", large - small, "MiB", detail);
}

async function manyChunks(runs: number): Promise<void> {
  say(`A body of a million chunks of one byte: median ratio of ${runs} runs in turn`);
  if (!await works([CURL, "--version"])) {
    return say("  not measured, as curl is missing: a million chunks, ours / curl");
  }
  const head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
  const reply = new TextEncoder().encode(`${head}${"1\r\nx\r\n".repeat(1_000_000)}0\r\n\r\n`);
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const answering = answer(listener, reply);
  const url = `http://127.0.0.1:${listener.addr.port}/`;
  const programs = { ours: toPipe(dscpGet("-s", url)), curl: toPipe([CURL, "-s", url]) };
  const { ours, curl } = await alternate(programs, runs);
  listener.close();
  await answering;
  const detail = `${median(ours).toFixed(0)} / ${median(curl).toFixed(0)} ms`;
  show("chunks", "a million chunks, ours / curl", ratio(ours, curl), "×", detail);
}

async function manyRequests(runs: number): Promise<void> {
  say(`10,000 requests in a process: median ratio of ${runs} runs; time of a request`);
  const ours = (url: string) => dscpGet("-s", "-n", "10000", url);
  const loop = (port: number) => deno("--allow-net", "loop.ts", "10000", String(port));
  const times = await alternate({ ours: ours(SITE), loop: loop(8086) }, runs);
  const [a, b] = [times.ours, times.loop].map((each) => (median(each) / 10).toFixed(0));
  const name = "-n 10000 / bare unmarked loop";
  show("series", name, ratio(times.ours, times.loop), "×", `${a} / ${b} µs`);
  const grown = await growth((port) => ours(`http://127.0.0.1:${port}/`));
  const grownLoop = await growth(loop);
  const detail = `the loop: ${grownLoop.toFixed(1)}`;
  show("series", "memory after 10,000 above that after 100", grown, "MiB", detail);
  await firstOverTls();
}

/** Whether the first request of an https series pays for loading TLS. */
async function firstOverTls(): Promise<void> {
  const name = "first request of an https series / median of 20";
  if (missing(["openssl", "nginx"]).length > 0) {
    return say(`  not measured, as openssl or nginx is missing: ${name}`);
  }
  await using made = await Certificates.create();
  const port = freePort();
  const files = `ssl_certificate ${made.certificate}; ssl_certificate_key ${made.key};`;
  const server = `server { listen 127.0.0.1:${port} ssl; ${files} return 200 "ok"; }`;
  await using _nginx = await startNginx(made.folder, server);
  const { stdout } = await execute(
    dscpGet("-k", "--json", "-n", "20", `https://127.0.0.1:${port}/`),
  );
  const times = stdout.trim().split("\n").map((line) => JSON.parse(line).milliseconds?.total)
    .filter((time) => time !== undefined);
  const detail = `${times[0].toFixed(1)} / ${median(times).toFixed(1)} ms`;
  show("series", name, times[0] / median(times), "×", detail);
}

/**
 * How much a client that sends 10,000 requests grows after the first hundred, in MiB. Counts anonymous
 * memory only: pages of Deno's own executable come and go with the page cache.
 */
async function growth(client: (port: number) => string[]): Promise<number> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const [program, ...args] = client(listener.addr.port);
  const output = { stdin: "null", stdout: "null", stderr: "null" } as const;
  const child = new Deno.Command(program, { args, ...output }).spawn();
  const ended = child.status.then(() => listener.close());
  const head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n";
  let early = NaN, late = NaN;
  await answer(listener, new TextEncoder().encode(`${head}ok`), (count) => {
    if (count === 100) early = memory(child.pid, "RssAnon");
    if (count === 9_990) late = memory(child.pid, "RssAnon");
  });
  await ended;
  return late - early;
}

async function farEnd(): Promise<void> {
  say("Requests a second, by ab -c 32 -n 5000: median ratio of three rounds in turn");
  if (missing(["ab"]).length > 0) {
    return say("  not measured, as ab is missing: Deno.serve / --serve -s, nginx, memory");
  }
  const [port, denoPort] = [freePort(), freePort()];
  const urls: Record<string, string> = {
    ours: `http://127.0.0.1:${port}/`,
    "Deno.serve": `http://127.0.0.1:${denoPort}/`,
  };
  await using ours = new Background(dscpGet("--serve", `127.0.0.1:${port}`, "-s"));
  const reply = await replyOf(urls.ours);
  const headers = JSON.stringify(Object.fromEntries(reply.headers));
  const args = [String(denoPort), await reply.text(), headers];
  await using _denoServe = new Background(deno("--allow-net", "serve.ts", ...args));
  await (await replyOf(urls["Deno.serve"])).body?.cancel();
  if (missing(["nginx"]).length === 0) urls["nginx return 200"] = `${SITE}page`;

  const rates: Record<string, number[]> = {};
  for (const name of Object.keys(urls)) rates[name] = [];
  for (let round = 0; round < 3; round++) {
    for (const [name, url] of Object.entries(urls)) rates[name].push(await requestRate(url));
  }
  for (const rival of Object.keys(urls).slice(1)) {
    const [a, b] = [rates[rival], rates.ours];
    const detail = `${median(a).toFixed(0)} / ${median(b).toFixed(0)}`;
    show("serve", `${rival} / --serve -s`, ratio(a, b), "×", detail);
  }
  show("serve", "memory of --serve after the runs", memory(ours.child.pid, "VmRSS"), "MiB");
}

/** Slow clients, 20 a second: each takes half a second to send its request. */
async function endure(runs: number): Promise<void> {
  const seconds = 3 * runs;
  say(`--serve with 20 clients a second that take 0.5 s each, for ${seconds} s`);
  const port = freePort();
  await using server = new Background(dscpGet("--serve", `127.0.0.1:${port}`, "-s"));
  await (await replyOf(`http://127.0.0.1:${port}/`)).body?.cancel();
  const { pid } = server.child;
  const times: number[] = [];
  const client = async () => {
    using conn = await Deno.connect({ hostname: "127.0.0.1", port });
    await pause(500);
    const sent = performance.now();
    await conn.write(new TextEncoder().encode(GET));
    await conn.read(new Uint8Array(4096));
    times.push(performance.now() - sent);
    await pause(300);
  };
  const clients: Promise<void>[] = [];
  let early = NaN, ticks = NaN;
  for (let second = 0; second < seconds; second++) {
    if (second === Math.floor(seconds / 3)) {
      [early, ticks] = [memory(pid, "VmRSS"), cpuTicks(pid)];
    }
    for (let at = 0; at < 20; at++) {
      clients.push(client());
      await pause(50);
    }
  }
  await Promise.all(clients);
  const used = (cpuTicks(pid) - ticks) / (seconds - Math.floor(seconds / 3));
  const name = "--serve with slow clients:";
  show("endure", `${name} processor`, used, "%");
  show("endure", `${name} memory added`, memory(pid, "VmRSS") - early, "MiB");
  show("endure", `${name} p99 of a reply`, quantile(times, 0.99), "ms");
}

/** A thousand connections at once that wait five seconds each, and a file read beside them. */
async function dials(): Promise<void> {
  say("1,000 connections at once to a server that answers after 5 s");
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const serving = (async () => {
    for await (const conn of listener) {
      pause(5000).then(async () => {
        await conn.write(new Uint8Array(1));
        conn.close();
      });
    }
  })();
  const all = async (open: () => Promise<Pick<Deno.Conn, "read" | "close">>) => {
    const started = performance.now();
    const ask = async () => {
      const conn = await open();
      await conn.read(new Uint8Array(1));
      conn.close();
    };
    const asked = Promise.all(Array.from({ length: 1000 }, ask));
    await pause(1000);
    const before = performance.now();
    await Deno.readTextFile(MAIN);
    const reading = performance.now() - before;
    await asked;
    return { total: performance.now() - started, reading };
  };
  const hostname = "127.0.0.1";
  const plain = await all(() => Deno.connect({ hostname, port }));
  const dialed = await all(() => dial({ hostname, port, tos: 0xb8 }));
  listener.close();
  await serving;
  const detail = `${dialed.total.toFixed(0)} / ${plain.total.toFixed(0)} ms`;
  const name = "1,000 dials / 1,000 Deno.connect";
  show("dials", name, dialed.total / plain.total, "×", detail);
  const beside = `beside Deno.connect: ${plain.reading.toFixed(1)}`;
  show("dials", "a file read beside 1,000 dials", dialed.reading, "ms", beside);
}

const pause = (milliseconds: number) => new Promise((go) => setTimeout(go, milliseconds));

async function requestRate(url: string): Promise<number> {
  const { stdout } = await run(["ab", "-q", "-c", "32", "-n", "5000", url]);
  return Number(/Requests per second:\s+([\d.]+)/.exec(stdout)![1]);
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** The reply of a server that was started just now, and may need up to five seconds. */
async function replyOf(url: string): Promise<Response> {
  for (let tries = 250;; tries--) {
    try {
      return await fetch(url);
    } catch (error) {
      if (tries === 0) throw error;
      await pause(20);
    }
  }
}

async function calm(): Promise<void> {
  say("An idle path: how many runs of -d EF,DF see a difference");
  for (const [runs, count] of [[200, 50], [20, 5000]]) {
    let differences = 0;
    for (let round = 0; round < runs; round++) {
      const words = ["-d", "EF,DF", "-n", String(count), SITE];
      const { stdout, stderr } = await run(dscpGet(...words));
      if (!`${stdout}${stderr}`.includes("no difference seen")) differences++;
    }
    show("calm", `of ${runs} runs on an idle path, -n ${count}`, differences, "");
  }
}

async function paths(runs: number): Promise<void> {
  say(`Three routers in namespaces: median ratio of ${runs} runs in turn`);
  const absent = missing(["root", "ip", "sysctl", "traceroute"]);
  if (absent.length > 0) return say(`  not measured: needs ${absent.join(", ")}`);
  await using chain = await Chain.create();
  await using _server = await FarEnd.start("[::]:8086", chain.server.under);
  const url = `http://${CHAIN_SERVER.ipv4}:8086/`, { under } = chain.client;
  const traceroute = [...under, ..."traceroute -T -n -p 8086".split(" "), CHAIN_SERVER.ipv4];
  const programs = {
    ours: [...under, ...dscpGet("-s", "--trace", url)],
    "traceroute -T -n": traceroute,
    "an empty Deno script": [...under, ...deno("empty.ts")],
    "--mark-syn": [...under, ...dscpGet("-s", "--mark-syn", url)],
  };
  const [ours, theirs] = [await run(programs.ours), await run(traceroute)].map(({ stdout }) =>
    [...stdout.matchAll(/^ *\d+ +([\d.]+) /gm)].map(([, address]) => address).join(" ")
  );
  if (ours !== theirs) say(`  other hops than traceroute: ${ours}, ${theirs}`);
  const times = await alternate(programs, runs);
  // traceroute is done before Deno has started, hence the other two.
  for (const rival of Object.keys(programs).slice(1)) {
    const [a, b] = [times.ours, times[rival]];
    const detail = `${median(a).toFixed(1)} / ${median(b).toFixed(1)} ms`;
    show("trace", `--trace / ${rival}`, ratio(a, b), "×", detail);
  }
  const all = { all: [...under, ...dscpGet("-s", "--trace", "-d", "all", url)] };
  const seconds = median((await alternate(all, 3)).all) / 1000;
  show("trace", "64 marks over three routers", seconds, "s");
}

/** How long the code is; tests/layout_test.ts fails if a single file or function is too long. */
function lines(): void {
  say("The code");
  const linesOf = (file: string | URL) => Deno.readTextFileSync(file).trimEnd().split("\n").length;
  const rooms = ["src/", "ffi/"].flatMap((name) => {
    const folder = new URL(`../${name}`, import.meta.url);
    return [...Deno.readDirSync(folder)].map(({ name }) => linesOf(new URL(name, folder)));
  });
  const main = linesOf(MAIN);
  show("lines", "lines of main.ts", main, "");
  show("lines", "lines of the largest file of src/ and ffi/", Math.max(...rooms), "");
  const all = rooms.reduce((sum, each) => sum + each, main);
  show("lines", "lines of main.ts + src/ + ffi/", all, "");
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────

/** The server on port 8086: nginx, or Python's. */
async function startServer(folder: string): Promise<Background> {
  if (missing(["nginx"]).length > 0) {
    const flags = ["--bind", "127.0.0.1", "--directory", folder];
    const server = new Background([PYTHON, "-u", "-m", "http.server", ...flags, "8086"]);
    await server.until((said) => said.includes("Serving HTTP"));
    return server;
  }
  // The fixed page is as long as that of --serve.
  return await startNginx(
    folder,
    `sendfile on; server {
      listen 127.0.0.1:8086; root ${folder};
      location = /page { return 200 "${"x".repeat(74)}"; }
    }`,
  );
}

/** What the figures depend on: the machine, and the versions of the installed programs. */
async function sayVersions(): Promise<void> {
  const { version, build } = Deno;
  const cores = `${navigator.hardwareConcurrency} cores`;
  say(`Deno ${version.deno}, ${build.target}, Linux ${Deno.osRelease()}, ${cores}`);
  const versions: string[] = [];
  for (const [name, words] of Object.entries(VERSIONS)) {
    try {
      const { stdout, stderr } = await run(words);
      versions.push(`${name} ${/\d+\.\d+[\w.-]*/.exec(stdout + stderr)?.[0]}`);
    } catch { /* not installed */ }
  }
  say(versions.join(", "));
}

/** What can be measured, by the name that `--only` takes, with about so many runs. */
const PARTS: Record<string, (runs: number) => Promise<void> | void> = {
  process: wholeProcess,
  mark: () => alone("mark"),
  proof: () => alone("proof"),
  body: (runs) => largeBody(Math.ceil(runs / 5)),
  chunks: (runs) => manyChunks(Math.ceil(runs / 5)),
  series: (runs) => manyRequests(Math.ceil(runs / 3)),
  serve: farEnd,
  endure,
  dials,
  calm,
  trace: (runs) => paths(Math.ceil(runs * 2 / 3)),
  lines,
};

interface Options {
  readonly runs: number;
  readonly parts: readonly string[];
  readonly isJson: boolean;
}

const USAGE = `Usage: deno task bench [--runs N] [--only PART] [--json]
N is 30 unless given. PART is one of: ${Object.keys(PARTS).join(" ")}`;

/** @throws {TypeError} the command line is not as in {@linkcode USAGE} */
function parseArguments(): Options {
  const { values: { runs, only, json, help } } = parseArgs({
    args: Deno.args,
    options: {
      runs: { type: "string", default: "30" },
      only: { type: "string" },
      json: { type: "boolean", default: false },
      help: { type: "boolean", short: "h" },
    },
  });
  if (help) {
    print(USAGE);
    Deno.exit(0);
  }
  if (!/^[1-9]\d*$/.test(runs)) throw new TypeError(`'${runs}' is not a number of runs`);
  if (only !== undefined && !Object.hasOwn(PARTS, only)) throw new TypeError(`no part '${only}'`);
  return {
    runs: Number(runs),
    parts: only === undefined ? Object.keys(PARTS) : [only],
    isJson: json,
  };
}

async function main({ runs, parts }: Options): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-bench-" });
  try {
    Deno.chdir(folder);
    await Deno.chmod(folder, 0o755);
    await Deno.writeTextFile("index.html", "<p>hello\n");
    await Deno.writeTextFile("large", "");
    await Deno.truncate("large", 2 ** 30);
    for (const [name, text] of Object.entries(SCRIPTS)) await Deno.writeTextFile(name, text);
    await using _server = await startServer(folder);
    await sayVersions();
    for (const part of parts) await PARTS[part](runs);
    const limited = figures.filter(({ limit }) => limit !== null);
    const within = limited.filter(({ value, limit }) => value <= limit!).length;
    say(`${within} figures within their limits, ${limited.length - within} over`);
    if (isJson) print(JSON.stringify({ runs, deno: Deno.version.deno, figures }));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

let options: Options;
try {
  options = parseArguments();
} catch (error) {
  const text = `bench: ${(error as Error).message}\n${USAGE}\n`;
  Deno.stderr.writeSync(new TextEncoder().encode(text));
  Deno.exit(2);
}
isJson = options.isJson;
await main(options);
