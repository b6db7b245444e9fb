/**
 * What marking and proving cost, beside the rivals; ratios first, as absolute times drift with the machine.
 *
 * ```sh
 * deno task bench                 # everything, some minutes
 * deno task bench --runs 10       # fewer runs
 * deno task bench --only process  # one of process, mark, proof, body, series
 * deno task bench --json          # for machines
 * ```
 *
 * Needs nobody on port 8086. nginx serves if it is there, else Python. Rivals that are not there are named; `NODE` and
 * `CURL` in the environment name other ones than those in the path.
 *
 * @module
 */

import { parseArgs } from "node:util";
import { setTos, takeSent, watchSent } from "../ffi/mod.ts";
import { quantile } from "../main.ts";
import { Background, MAIN, missing } from "./support.ts";

const URL_OF_ALL = "http://127.0.0.1:8086/";
const deno = (...words: string[]) => [Deno.execPath(), "run", "--no-prompt", ...words];
const OURS = ["--allow-net", "--allow-ffi", MAIN];

/** Scripts to compare with, each the least that does it. */
const SCRIPTS = {
  "bare.ts": `const conn = await Deno.connect({ hostname: "127.0.0.1", port: 8086 });
await conn.write(new TextEncoder().encode("GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n"));
const buffer = new Uint8Array(65536);
for (let size; (size = await conn.read(buffer)) !== null;) await Deno.stdout.write(buffer.subarray(0, size));
conn.close();
export {};
`,
  "fetch.ts": `const reply = await fetch("${URL_OF_ALL}");
await Deno.stdout.write(await reply.bytes());
export {};
`,
  "loop.ts":
    `const request = new TextEncoder().encode("GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n");
const buffer = new Uint8Array(65536);
for (let left = Number(Deno.args[0]); left > 0; left--) {
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: 8086 });
  await conn.write(request);
  while (await conn.read(buffer) !== null);
  conn.close();
}
export {};
`,
  "node.mjs": `import net from "node:net";
const socket = net.connect({ host: "127.0.0.1", port: 8086, typeOfService: 0xb8 });
socket.end("GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n");
socket.pipe(process.stdout);
`,
  "get.py": `import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", 8086)
connection.request("GET", "/")
sys.stdout.buffer.write(connection.getresponse().read())
`,
};

const REQUEST = "GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n";

// ─── Measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** Runs a program with its output drained. @returns milliseconds */
async function time(words: readonly string[]): Promise<number> {
  const started = performance.now();
  const process = new Deno.Command(words[0], { args: words.slice(1), stdin: "null", stdout: "piped", stderr: "null" });
  const { code } = await process.output();
  if (code !== 0) throw new Error(`${words.join(" ")}: exit ${code}`);
  return performance.now() - started;
}

/** Times of several programs, run in turn. */
async function alternate(
  programs: ReadonlyMap<string, readonly string[]>,
  runs: number,
): Promise<Map<string, number[]>> {
  const times = new Map([...programs.keys()].map((name) => [name, [] as number[]]));
  for (let run = -3; run < runs; run++) {
    for (const [name, words] of programs) {
      const taken = await time(words);
      if (run >= 0) times.get(name)!.push(taken);
    }
  }
  return times;
}

const median = (values: readonly number[]) => quantile(values, 0.5);

/** The median of the ratios of runs that came one after the other. */
function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, at) => value / theirs[at]));
}

/** The most memory a program held, in KiB, by its own account in /proc. */
async function peakMemory(words: readonly string[]): Promise<number> {
  const child = new Deno.Command(words[0], { args: words.slice(1), stdin: "null", stdout: "piped", stderr: "null" })
    .spawn();
  const drained = child.stdout.pipeTo(new WritableStream());
  const ended = child.status;
  let peak = 0, isRunning = true;
  ended.then(() => isRunning = false);
  while (isRunning) {
    try {
      const status = Deno.readTextFileSync(`/proc/${child.pid}/status`);
      peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
    } catch { /* it has ended */ }
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  await drained;
  return peak;
}

// ─── What is shown ───────────────────────────────────────────────────────────────────────────────────────────────────

interface Figure {
  readonly question: string;
  readonly name: string;
  readonly value: number;
  readonly unit: string;
  readonly detail: string;
}

const figures: Figure[] = [];
let isJson = false;

function say(text: string): void {
  if (!isJson) Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));
}

function show(question: string, name: string, value: number, unit: string, detail = ""): void {
  figures.push({ question, name, value, unit, detail });
  say(`  ${value.toFixed(2).padStart(8)} ${unit.padEnd(4)} ${name.padEnd(58)} ${detail}`.trimEnd());
}

// ─── The questions ───────────────────────────────────────────────────────────────────────────────────────────────────

/** The rivals that are there, and the names of those that are not. */
async function rivals(folder: string): Promise<{ found: Map<string, string[]>; absent: string[] }> {
  const found = new Map<string, string[]>([
    ["bare Deno.connect, unmarked", deno("--allow-net", `${folder}/bare.ts`)],
    ["Deno fetch, unmarked", deno("--allow-net", `${folder}/fetch.ts`)],
  ]);
  const absent: string[] = [];
  const tell = (name: string, words: string[] | null) => words === null ? absent.push(name) : found.set(name, words);
  const outputOf = async (words: string[]) => {
    try {
      const { stdout } = await new Deno.Command(words[0], { args: words.slice(1), stdin: "null", stderr: "null" })
        .output();
      return new TextDecoder().decode(stdout).trim();
    } catch {
      return "";
    }
  };
  const node = Deno.env.get("NODE") ?? "node";
  const nodeVersion = await outputOf([node, "--version"]);
  tell(
    "Node 26, typeOfService",
    Number(nodeVersion.slice(1).split(".")[0]) >= 26 ? [node, `${folder}/node.mjs`] : null,
  );
  const curl = Deno.env.get("CURL") ?? "curl";
  const canMark = (await outputOf([curl, "--help", "all"])).includes("--ip-tos");
  const isThere = (await outputOf([curl, "--version"])) !== "";
  tell(
    `curl${canMark ? " --ip-tos EF" : ", unmarked"}`,
    isThere ? [curl, "-s", ...canMark ? ["--ip-tos", "EF"] : [], URL_OF_ALL] : null,
  );
  const shell = (command: string) => ["sh", "-c", `printf '${REQUEST}' | ${command}`];
  const program = (name: string, label: string, words: string[]) =>
    tell(label, missing([name]).length === 0 ? words : null);
  program("python3", "Python http.client, unmarked", ["/usr/bin/env", "python3", `${folder}/get.py`]);
  program("nc", "nc -T 0xb8", shell("nc -T 0xb8 127.0.0.1 8086"));
  program("socat", "socat tos=184", shell("socat - TCP:127.0.0.1:8086,tos=184"));
  return { found, absent };
}

async function wholeProcess(folder: string, runs: number): Promise<void> {
  const { found, absent } = await rivals(folder);
  say(`\nWhole process, a small reply: ratio of medians of ${runs} runs in turn`);
  const ours = new Map<string, string[]>([
    ["plain run", deno(...OURS)],
    ["--json and a URL", deno(...OURS, "--json", URL_OF_ALL)],
    ["--mark-syn", deno(...OURS, "--mark-syn")],
  ]);
  const times = await alternate(new Map([...ours, ...found]), runs);
  for (const name of ours.keys()) {
    for (const rival of found.keys()) {
      const [a, b] = [times.get(name)!, times.get(rival)!];
      show("process", `${name} / ${rival}`, ratio(a, b), "×", `${median(a).toFixed(1)} / ${median(b).toFixed(1)} ms`);
    }
  }
  if (absent.length > 0) say(`  not here: ${absent.join(", ")}`);
}

/** Microseconds of `work`, median, each on a connection made just now. */
async function onFresh(
  rounds: number,
  prepare: (conn: Deno.TcpConn) => Promise<void> | void,
  work: (conn: Deno.TcpConn) => void,
) {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const taken: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const [conn, other] = await Promise.all([
      Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port }),
      listener.accept(),
    ]);
    await prepare(conn);
    const started = performance.now();
    work(conn);
    taken.push((performance.now() - started) * 1000);
    conn.close();
    other.close();
  }
  return median(taken.slice(rounds >> 2));
}

async function markAlone(): Promise<void> {
  say("\nMarking alone: find, set, read back, on a connection made just now");
  const open: Deno.Listener[] = [];
  const results: number[] = [];
  for (const count of [20, 1000, 10_000]) {
    try {
      while (open.length < count) open.push(Deno.listen({ hostname: "127.0.0.1", port: 0 }));
    } catch (error) {
      say(`  ${count} sockets: ${(error as Error).message}; ulimit -n is too low`);
      break;
    }
    results.push(await onFresh(2000, () => {}, (conn) => setTos(conn, 0xb8)));
    show("mark", `with ${count} open sockets`, results.at(-1)!, "µs");
  }
  if (results.length === 3) show("mark", "10,000 sockets / 20 sockets", results[2] / results[0], "×");
  for (const listener of open) listener.close();
}

async function proofAlone(): Promise<void> {
  say("\nProof alone: have the packets kept; take and parse one");
  show("proof", "enable", await onFresh(2000, (conn) => void setTos(conn, 0xb8), watchSent), "µs");
  const sent = async (conn: Deno.TcpConn) => {
    watchSent(conn);
    await conn.write(new Uint8Array(100));
  };
  const take = (conn: Deno.TcpConn) => {
    if (takeSent(conn).length !== 1) throw new Error("no packet");
  };
  show("proof", "drain and parse", await onFresh(2000, sent, take), "µs");
}

async function largeBody(runs: number): Promise<void> {
  say(`\n1 GiB to a pipe: ratio of medians of ${runs} runs in turn`);
  const url = `${URL_OF_ALL}large`;
  const pipe = (words: string[]) => ["sh", "-c", `${words.map((word) => `'${word}'`).join(" ")} | cat > /dev/null`];
  const ours = deno(...OURS, "-s");
  const programs = new Map([["ours", pipe([...ours, url])]]);
  if (missing(["curl"]).length === 0) programs.set("curl", pipe(["curl", "-s", url]));
  const times = await alternate(programs, runs);
  const speed = (name: string) => `${(1024 / (median(times.get(name)!) / 1000)).toFixed(0)} MiB/s`;
  if (programs.has("curl")) {
    show(
      "body",
      "ours / curl",
      ratio(times.get("ours")!, times.get("curl")!),
      "×",
      `${speed("ours")} / ${speed("curl")}`,
    );
  }
  const [small, large] = [await peakMemory([...ours, URL_OF_ALL]), await peakMemory([...ours, url])];
  show(
    "body",
    "peak memory above that of a small reply",
    (large - small) / 1024,
    "MiB",
    `${(large / 1024).toFixed(0)} MiB in all`,
  );
}

async function manyRequests(folder: string, runs: number): Promise<void> {
  say(`\n1,000 requests in one process: ratio of medians of ${runs} runs in turn`);
  const times = await alternate(
    new Map([
      ["ours", deno(...OURS, "-s", "-n", "1000", URL_OF_ALL)],
      ["loop", deno("--allow-net", `${folder}/loop.ts`, "1000")],
    ]),
    runs,
  );
  const [a, b] = [times.get("ours")!, times.get("loop")!];
  show(
    "series",
    "-n 1000 / bare unmarked loop",
    ratio(a, b),
    "×",
    `${median(a).toFixed(0)} / ${median(b).toFixed(0)} µs a request`,
  );
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The one server of all: nginx, else Python's. */
async function serve(folder: string): Promise<Background> {
  if (missing(["nginx"]).length > 0) {
    const words = ["python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, "8086"];
    const server = new Background(words);
    await server.until((said) => said.includes("Serving HTTP"));
    return server;
  }
  await Deno.writeTextFile(
    `${folder}/nginx.conf`,
    `daemon off; pid ${folder}/pid; error_log stderr notice; worker_processes 1; events { worker_connections 4096; }
    http { access_log off; sendfile on; client_body_temp_path ${folder}/b; proxy_temp_path ${folder}/p;
    fastcgi_temp_path ${folder}/f; uwsgi_temp_path ${folder}/u; scgi_temp_path ${folder}/s;
    server { listen 127.0.0.1:8086; root ${folder}; } }`,
  );
  const server = new Background(["nginx", "-c", `${folder}/nginx.conf`, "-e", "stderr"]);
  await server.until((said) => said.includes("start worker process"));
  return server;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    args: Deno.args,
    options: {
      runs: { type: "string", default: "30" },
      only: { type: "string" },
      json: { type: "boolean", default: false },
    },
  });
  isJson = values.json;
  const runs = Number(values.runs);
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-bench-" });
  try {
    await Deno.chmod(folder, 0o755);
    await Deno.writeTextFile(`${folder}/index.html`, "<p>hello\n");
    await Deno.writeTextFile(`${folder}/large`, "");
    await Deno.truncate(`${folder}/large`, 2 ** 30);
    for (const [name, text] of Object.entries(SCRIPTS)) await Deno.writeTextFile(`${folder}/${name}`, text);
    await using _server = await serve(folder);
    const { version, build } = Deno;
    say(`Deno ${version.deno}, ${build.target}, Linux ${Deno.osRelease()}, ${navigator.hardwareConcurrency} cores`);
    const questions: [string, () => Promise<void>][] = [
      ["process", () => wholeProcess(folder, runs)],
      ["mark", markAlone],
      ["proof", proofAlone],
      ["body", () => largeBody(Math.ceil(runs / 5))],
      ["series", () => manyRequests(folder, Math.ceil(runs / 3))],
    ];
    for (const [name, ask] of questions) if (values.only === undefined || values.only === name) await ask();
    if (isJson) {
      Deno.stdout.writeSync(new TextEncoder().encode(JSON.stringify({ runs, deno: version.deno, figures }) + "\n"));
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

await main();
