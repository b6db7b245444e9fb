/**
 * What marking and proving cost, beside the rivals; ratios first, as absolute times drift with the machine.
 *
 * ```sh
 * deno task bench                 # everything, some minutes
 * deno task bench --runs 10       # fewer runs
 * deno task bench --only process  # one of process, mark, proof, body, series, calm
 * deno task bench --json          # for machines
 * ```
 *
 * Needs nobody on port 8086. nginx serves if it is there, else Python. Rivals that are not there are named; `NODE` and
 * `CURL` in the environment name other ones than those in the path. Where a figure has a limit it stands beside it.
 *
 * @module
 */

import { parseArgs } from "node:util";
import { quantile } from "../main.ts";
import { Background, MAIN, missing } from "./support/processes.ts";
import { startNginx } from "./support/servers.ts";

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
  "naive.ts": `const conn = await Deno.connect({ hostname: "127.0.0.1", port: 8086 });
const { symbols: libc } = Deno.dlopen("libc.so.6", {
  getsockname: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
});
const address = new Uint8Array(28), size = new Uint32Array([28]), { port } = conn.localAddr as Deno.NetAddr;
for (let fd = 3; fd < 100; fd++) {
  if (libc.getsockname(fd, address, size) !== 0 || (address[2] << 8 | address[3]) !== port) continue;
  libc.setsockopt(fd, 0, 1, new Int32Array([0xb8]), 4);
  break;
}
await conn.write(new TextEncoder().encode("GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n"));
const buffer = new Uint8Array(65536);
for (let size; (size = await conn.read(buffer)) !== null;) await Deno.stdout.write(buffer.subarray(0, size));
conn.close();
export {};
`,
  "empty.ts": "export {};\n",
  "load.ts": `import "${new URL("../main.ts", import.meta.url)}";\n`,
  "fetch.ts": `const reply = await fetch("${URL_OF_ALL}");
await Deno.stdout.write(await reply.bytes());
export {};
`,
  "loop.ts":
    `const request = new TextEncoder().encode("GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8086\\r\\nConnection: close\\r\\n\\r\\n");
const buffer = new Uint8Array(65536);
for (let left = Number(Deno.args[0]); left > 0; left--) {
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: Number(Deno.args[1]) });
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
  const process = new Deno.Command(words[0], {
    args: words.slice(1),
    stdin: "null",
    stdout: "piped",
    stderr: "null",
  });
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

/** The most memory a program held, in KiB: the kernel keeps the peak, and is asked for it until the program is gone. */
async function peakMemory(words: readonly string[]): Promise<number> {
  const child = new Deno.Command(words[0], {
    args: words.slice(1),
    stdin: "null",
    stdout: "piped",
    stderr: "null",
  })
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
  /** The most that it is meant to be. */
  readonly limit: number | null;
}

/** What each figure is meant to be at most. */
const LIMITS: Record<string, number> = {
  "plain run / bare Deno.connect, unmarked": 1.12,
  "--json and a URL / bare Deno.connect, unmarked": 1.6,
  "plain run / Deno fetch, unmarked": 0.8,
  "plain run / Node 26, typeOfService": 0.6,
  "--mark-syn / Node 26, typeOfService": 1,
  "with 20 open sockets": 30,
  "10,000 sockets / 20 sockets": 1.5,
  "ours / curl": 1,
  "peak memory above that of a small reply": 16,
  "-n 10000 / bare unmarked loop": 1.1,
  "memory after 10,000 requests above that after 100": 8,
  "of 20 runs on an idle path, those that see a difference": 1,
};

const figures: Figure[] = [];
let isJson = false;

function say(text: string): void {
  if (!isJson) Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));
}

function show(question: string, name: string, value: number, unit: string, detail = ""): void {
  const limit = LIMITS[name] ?? null;
  figures.push({ question, name, value, unit, detail, limit });
  const meant = limit === null ? "" : `${value <= limit ? "≤" : "over"} ${limit}`;
  say(
    `  ${value.toFixed(2).padStart(8)} ${unit.padEnd(4)} ${meant.padEnd(10)} ${
      name.padEnd(56)
    } ${detail}`.trimEnd(),
  );
}

// ─── The questions ───────────────────────────────────────────────────────────────────────────────────────────────────

/** The rivals that are there, and the names of those that are not. */
async function rivals(
  folder: string,
): Promise<{ found: Map<string, string[]>; absent: string[]; versions: string[] }> {
  const found = new Map<string, string[]>([
    ["bare Deno.connect, unmarked", deno("--allow-net", `${folder}/bare.ts`)],
    ["Deno fetch, unmarked", deno("--allow-net", `${folder}/fetch.ts`)],
    ["a naive marked Deno script", deno("--allow-net", "--allow-ffi", `${folder}/naive.ts`)],
  ]);
  const absent: string[] = [], versions: string[] = [];
  const tell = (name: string, words: string[] | null) =>
    words === null ? absent.push(name) : found.set(name, words);
  const outputOf = async (words: string[]) => {
    try {
      const process = new Deno.Command(words[0], { args: words.slice(1), stdin: "null" });
      const { stdout, stderr } = await process.output();
      return new TextDecoder().decode(stdout.length > 0 ? stdout : stderr).trim();
    } catch {
      return "";
    }
  };
  const node = Deno.env.get("NODE") ?? "node";
  const nodeVersion = await outputOf([node, "--version"]);
  for (
    const [name, words] of [
      ["Node", [node, "--version"]],
      ["curl", [Deno.env.get("CURL") ?? "curl", "--version"]],
      ["Python", ["python3", "--version"]],
      ["nc", ["nc", "-h"]],
      ["socat", ["socat", "-V"]],
      ["nginx", ["nginx", "-v"]],
    ] as const
  ) {
    const version = /\d+\.\d+[\w.-]*|OpenBSD netcat \([^)]*\)/.exec(await outputOf([...words]))
      ?.[0];
    if (version !== undefined) versions.push(`${name} ${version}`);
  }
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
  program("python3", "Python http.client, unmarked", [
    "/usr/bin/env",
    "python3",
    `${folder}/get.py`,
  ]);
  program("nc", "nc -T 0xb8", shell("nc -T 0xb8 127.0.0.1 8086"));
  program("socat", "socat tos=184", shell("socat - TCP:127.0.0.1:8086,tos=184"));
  return { found, absent, versions };
}

async function wholeProcess(folder: string, runs: number): Promise<void> {
  const { found, absent, versions } = await rivals(folder);
  say(`\nWhole process, a small reply: median of the ratios of ${runs} runs in turn`);
  say(`  ${versions.join(", ")}${absent.length > 0 ? `; not here: ${absent.join(", ")}` : ""}`);
  const ours = new Map<string, string[]>([
    ["plain run", deno(...OURS)],
    ["--json and a URL", deno(...OURS, "--json", URL_OF_ALL)],
    ["--mark-syn", deno(...OURS, "--mark-syn")],
  ]);
  // What the others are to be seen against: Deno's own start, and that with our modules loaded but not run.
  const parts = new Map<string, string[]>([
    ["an empty Deno script", deno(`${folder}/empty.ts`)],
    ["our modules loaded, not run", deno(`${folder}/load.ts`)],
  ]);
  const times = await alternate(new Map([...ours, ...found, ...parts]), runs);
  const compare = (name: string, rival: string) => {
    const [a, b] = [times.get(name)!, times.get(rival)!];
    show(
      "process",
      `${name} / ${rival}`,
      ratio(a, b),
      "×",
      `${median(a).toFixed(1)} / ${median(b).toFixed(1)} ms`,
    );
  };
  for (const name of ours.keys()) for (const rival of found.keys()) compare(name, rival);
  const [bare] = found.keys();
  for (const name of [...parts.keys(), ...[...found.keys()].slice(1, 3)]) compare(name, bare);
}

/** One result of `deno bench --json`. */
interface Benched {
  readonly name: string;
  readonly results: readonly {
    readonly ok?: { readonly n: number; readonly p75: number; readonly avg: number };
  }[];
}

/** Marking alone and proof alone, which {@link https://docs.deno.com/api/deno/~/Deno.bench | Deno.bench} measures. */
async function alone(question: "mark" | "proof"): Promise<void> {
  say(
    question === "mark"
      ? "\nMarking alone, by Deno.bench: find, set, read back, on a connection made just now"
      : "\nProof alone, by Deno.bench: have the packets kept; take and parse one",
  );
  const file = new URL("mark_bench.ts", import.meta.url).pathname;
  const process = new Deno.Command(Deno.execPath(), {
    args: ["bench", "--quiet", "--json", "--allow-all", "--no-check", `--filter=${question}`, file],
    stdin: "null",
    stderr: "inherit",
  });
  const { stdout } = await process.output();
  const benches: Benched[] = JSON.parse(new TextDecoder().decode(stdout)).benches;
  const micros = new Map<string, number>();
  for (const { name, results: [{ ok }] } of benches) {
    const label = name.replace(`${question}: `, "");
    if (ok === undefined) {
      say(`  ${label}: it failed; ulimit -n may be too low`);
      continue;
    }
    micros.set(label, ok.p75 / 1000);
    show(question, label, ok.p75 / 1000, "µs", `75 % take no longer, ${ok.n} times`);
  }
  const [few, many] = ["with 20 open sockets", "with 10000 open sockets"].map((label) =>
    micros.get(label) ?? NaN
  );
  if (question === "mark") show("mark", "10,000 sockets / 20 sockets", many / few, "×");
}

async function largeBody(runs: number): Promise<void> {
  say(`\n1 GiB to a pipe: ratio of medians of ${runs} runs in turn`);
  const url = `${URL_OF_ALL}large`;
  const pipe = (
    words: string[],
  ) => ["sh", "-c", `${words.map((word) => `'${word}'`).join(" ")} | cat > /dev/null`];
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
  const [small, large] = [
    await peakMemory([...ours, URL_OF_ALL]),
    await peakMemory([...ours, url]),
  ];
  show(
    "body",
    "peak memory above that of a small reply",
    (large - small) / 1024,
    "MiB",
    `${(large / 1024).toFixed(0)} MiB in all`,
  );
}

async function manyRequests(folder: string, runs: number): Promise<void> {
  const many = 10_000;
  say(
    `\n${
      many.toLocaleString("en")
    } requests in one process: median of the ratios of ${runs} runs in turn`,
  );
  const times = await alternate(
    new Map([
      ["ours", deno(...OURS, "-s", "-n", String(many), URL_OF_ALL)],
      ["loop", deno("--allow-net", `${folder}/loop.ts`, String(many), "8086")],
    ]),
    runs,
  );
  const [a, b] = [times.get("ours")!, times.get("loop")!];
  const each = (values: number[]) => (median(values) / many * 1000).toFixed(0);
  show(
    "series",
    `-n ${many} / bare unmarked loop`,
    ratio(a, b),
    "×",
    `${each(a)} / ${each(b)} µs a request`,
  );
  const own = await growth(
    many,
    (port) => deno(...OURS, "-s", "-n", String(many), `http://127.0.0.1:${port}/`),
  );
  const bare = await growth(
    many,
    (port) => deno("--allow-net", `${folder}/loop.ts`, String(many), String(port)),
  );
  show(
    "series",
    `memory after ${many.toLocaleString("en")} requests above that after 100`,
    own.anonymous,
    "MiB",
    `the bare loop: ${bare.anonymous.toFixed(1)}; with the pages of Deno's own file: ${
      own.all.toFixed(1)
    } / ${bare.all.toFixed(1)}`,
  );
}

/** What a process holds, in MiB: memory of its own, and with the pages that it shares with the files they are of. */
interface Memory {
  readonly anonymous: number;
  readonly all: number;
}

/** How much more a client holds near its last request than after a hundred: the server counts them, and looks. */
async function growth(requests: number, client: (port: number) => string[]): Promise<Memory> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const [program, ...args] = client(listener.addr.port);
  const child = new Deno.Command(program, { args, stdin: "null", stdout: "null", stderr: "null" })
    .spawn();
  const ended = child.status.then(() => listener.close());
  const held = (): Memory => {
    const status = Deno.readTextFileSync(`/proc/${child.pid}/status`);
    const of = (name: string) => Number(new RegExp(`${name}:\\s+(\\d+)`).exec(status)?.[1]) / 1024;
    return { anonymous: of("RssAnon"), all: of("VmRSS") };
  };
  const reply = new TextEncoder().encode(
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
  );
  const buffer = new Uint8Array(4096);
  let early: Memory | null = null, late: Memory | null = null, count = 0;
  for await (const conn of listener) {
    await conn.read(buffer);
    await conn.write(reply);
    conn.close();
    count++;
    if (count === 100) early = held();
    if (count === requests - 10) late = held();
  }
  await ended;
  return { anonymous: late!.anonymous - early!.anonymous, all: late!.all - early!.all };
}

async function calm(): Promise<void> {
  say("\nAn idle path: -d EF,DF -n 50, twenty times");
  let differences = 0;
  for (let run = 0; run < 20; run++) {
    const [program, ...args] = deno(...OURS, "-d", "EF,DF", "-n", "50", URL_OF_ALL);
    const { stderr } = await new Deno.Command(program, { args, stdin: "null", stdout: "null" })
      .output();
    if (!new TextDecoder().decode(stderr).includes("no difference seen")) differences++;
  }
  show("calm", "of 20 runs on an idle path, those that see a difference", differences, "");
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The one server of all: nginx, else Python's. */
async function serve(folder: string): Promise<Background> {
  if (missing(["nginx"]).length > 0) {
    const words = [
      "python3",
      "-u",
      "-m",
      "http.server",
      "--bind",
      "127.0.0.1",
      "--directory",
      folder,
      "8086",
    ];
    const server = new Background(words);
    await server.until((said) => said.includes("Serving HTTP"));
    return server;
  }
  return await startNginx(
    folder,
    `sendfile on; server { listen 127.0.0.1:8086; root ${folder}; }`,
  );
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
    for (const [name, text] of Object.entries(SCRIPTS)) {
      await Deno.writeTextFile(`${folder}/${name}`, text);
    }
    await using _server = await serve(folder);
    const { version, build } = Deno;
    say(
      `Deno ${version.deno}, ${build.target}, Linux ${Deno.osRelease()}, ${navigator.hardwareConcurrency} cores`,
    );
    const questions: [string, () => Promise<void>][] = [
      ["process", () => wholeProcess(folder, runs)],
      ["mark", () => alone("mark")],
      ["proof", () => alone("proof")],
      ["body", () => largeBody(Math.ceil(runs / 5))],
      ["series", () => manyRequests(folder, Math.ceil(runs / 3))],
      ["calm", calm],
    ];
    for (const [name, ask] of questions) {
      if (values.only === undefined || values.only === name) await ask();
    }
    if (isJson) {
      Deno.stdout.writeSync(
        new TextEncoder().encode(JSON.stringify({ runs, deno: version.deno, figures }) + "\n"),
      );
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

await main();
