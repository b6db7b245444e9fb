/**
 * A congested network in three namespaces, and what a mark changes in it. Needs root and iproute2.
 *
 * ```sh
 * deno task lab                       # EF through a busy bottleneck: unmarked, marked after connect, marked from the SYN on
 * deno task lab --svg FILE            # the same, and its picture
 * deno task lab --scene rewrite       # a router that clears some code points
 * deno task lab --scene pfifo         # Linux's default queue, where EF gains nothing
 * deno task lab --scene path          # a router that rewrites EF, found hop by hop
 * ```
 *
 * @module
 */

import { parseArgs } from "node:util";
import { describe, markOf, parseDscp } from "../ffi/mod.ts";
import { mannWhitney, quantile } from "../main.ts";
import { Network, SERVER } from "./support/namespaces.ts";
import { pathScene } from "./support/path_scene.ts";
import { Background, dscpGet, missing } from "./support/processes.ts";
import { FarEnd } from "./support/servers.ts";

const say = (text = "") => Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));

/** Where the router's bottleneck is, and how fast. */
const DEVICE = "r1", RATE = "5mbit", QUEUE = 200;

/** One way of asking, and the times it took, in milliseconds. */
interface Measured {
  readonly label: string;
  readonly sentence: string;
  readonly connect: number[];
  readonly total: number[];
}

// ─── The network ─────────────────────────────────────────────────────────────────────────────────────────────────────

/** An htb bottleneck with a class of its own for EF; what waits, waits in queues of {@linkcode QUEUE} packets. */
async function expedite(network: Network): Promise<void> {
  const tc = (...words: string[]) => network.router.run("tc", ...words);
  await network.router.run("ip", "link", "set", DEVICE, "txqueuelen", String(QUEUE));
  await tc("qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "htb", "default", "20");
  const classOf = (parent: string, id: string, ...rest: string[]) =>
    tc("class", "add", "dev", DEVICE, "parent", parent, "classid", id, "htb", ...rest);
  await classOf("1:", "1:1", "rate", RATE);
  await classOf("1:1", "1:10", "rate", "2mbit", "ceil", RATE, "prio", "0");
  await classOf("1:1", "1:20", "rate", "3mbit", "ceil", RATE, "prio", "1");
  // EF is 0xB8, and the two ECN bits do not count.
  await tc(
    ..."filter add dev r1 parent 1: protocol ip u32 match ip dsfield 0xb8 0xfc flowid 1:10".split(
      " ",
    ),
  );
}

/** The same bottleneck with Linux's default queue of three bands. */
async function pfifoFast(network: Network): Promise<void> {
  const tc = (...words: string[]) => network.router.run("tc", ...words);
  await network.router.run("ip", "link", "set", DEVICE, "txqueuelen", String(QUEUE));
  await tc(..."qdisc add dev r1 root handle 1: tbf rate 5mbit burst 5kb limit 1mb".split(" "));
  await tc(..."qdisc add dev r1 parent 1:1 handle 10: pfifo_fast".split(" "));
}

/** Four flows that fill the bottleneck until disposed of. */
async function fill(network: Network): Promise<AsyncDisposable> {
  const stack = new AsyncDisposableStack();
  const self = (
    ...words: string[]
  ) => [Deno.execPath(), "run", "--allow-net", import.meta.filename!, ...words];
  const sink = stack.use(new Background([...network.server.under, ...self("--sink")]));
  await sink.until((said) => said.includes("ready"));
  const source = stack.use(
    new Background([...network.client.under, ...self("--source", SERVER.ipv4)]),
  );
  await source.until((said) => said.includes("ready"));
  return stack;
}

const BULK_PORT = 5001, FLOWS = 4;

/** The bulk flows' far end: reads and forgets. */
async function sink(): Promise<void> {
  const listener = Deno.listen({ hostname: "0.0.0.0", port: BULK_PORT });
  say("ready");
  for await (const conn of listener) conn.readable.pipeTo(new WritableStream()).catch(() => {});
}

/** The bulk flows' near end: writes as fast as the network takes it, and says so once every flow waits for it. */
async function source(host: string): Promise<void> {
  const bytes = new Uint8Array(65536);
  let waiting = 0;
  const flow = async () => {
    const conn = await Deno.connect({ hostname: host, port: BULK_PORT });
    for (let sent = 0, told = false;;) {
      sent += await conn.write(bytes);
      // By then the sender's own buffer is full, and the queue of the bottleneck with it.
      if (told || sent < 1_000_000) continue;
      told = true;
      if (++waiting === FLOWS) say("ready");
    }
  };
  await Promise.all(Array.from({ length: FLOWS }, flow));
}

// ─── Scenes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What is used of a line of JSON. */
interface Line {
  readonly mark: { readonly dscp: number };
  readonly arrived: { readonly syn: number } | null;
  readonly reply: { readonly complete: boolean } | null;
  readonly milliseconds: { readonly connect: number; readonly total: number };
}

/** Runs the script in the client, and gives its JSON lines. */
async function ask(network: Network, ...args: string[]): Promise<Line[]> {
  const { stdout } = await dscpGet(
    ["--json", "-m", "15", ...args, `http://${SERVER.ipv4}:8086/`],
    network.client,
  );
  return stdout.trim().split("\n").map((line) => JSON.parse(line));
}

async function measure(
  network: Network,
  label: string,
  sentence: string,
  ...args: string[]
): Promise<Measured> {
  const times = (await ask(network, ...args)).filter(({ reply }) => reply?.complete).map((line) =>
    line.milliseconds
  );
  return {
    label,
    sentence,
    connect: times.map(({ connect }) => connect),
    total: times.map(({ total }) => total),
  };
}

/** EF through a busy bottleneck. */
export async function bottleneck(network: Network, rounds: number): Promise<Measured[]> {
  await expedite(network);
  await using _server = await FarEnd.start("0.0.0.0:8086", network.server.under);
  const count = ["-n", String(rounds)];
  const idle = await measure(
    network,
    "idle, DF",
    "With nobody else on the link, no mark is needed.",
    "-d",
    "DF",
    ...count,
  );
  await using _flows = await fill(network);
  // Side by side, so that all meet the same queue.
  const busy = await Promise.all([
    measure(
      network,
      "busy, DF",
      "Unmarked, every packet waits behind the bulk flows.",
      "-d",
      "DF",
      ...count,
    ),
    measure(
      network,
      "busy, EF",
      "Marked after connect, the SYN still waits.",
      "-d",
      "EF",
      ...count,
    ),
    measure(
      network,
      "busy, EF, --mark-syn",
      "Marked from the SYN on, nothing waits.",
      "-d",
      "EF",
      "--mark-syn",
      ...count,
    ),
  ]);
  return [idle, ...busy];
}

/** The code points that the router of the second scene clears. */
export const CLEARED = ["CS6", "CS7", "AF11", "AF12", "AF13", "7"];

/** Which code points arrive changed: DSCP sent → DSCP arrived. */
export async function rewrite(network: Network): Promise<Map<number, number>> {
  const points = CLEARED.map((name) => parseDscp(name).dscp).join(", ");
  await network.router.run(
    "nft",
    "add table ip q; add chain ip q f { type filter hook forward priority mangle; }",
  );
  await network.router.run(
    "nft",
    `add rule ip q f iifname r0 ip dscp { ${points} } ip dscp set cs0`,
  );
  await using _server = await FarEnd.start("0.0.0.0:8086", network.server.under);
  const seen = (await ask(network, "-d", "all", "--mark-syn")).map((
    { mark, arrived },
  ) => [mark.dscp, arrived!.syn >> 2]);
  return new Map(seen.filter(([sent, arrived]) => sent !== arrived) as [number, number][]);
}

/** Linux's default queue: EF beside DF and DSCP 4, the old ToS 0x10 "low delay". */
export async function pfifo(network: Network, rounds: number): Promise<Measured[]> {
  await pfifoFast(network);
  await using _server = await FarEnd.start("0.0.0.0:8086", network.server.under);
  await using _flows = await fill(network);
  const count = ["-n", String(rounds), "--mark-syn"];
  return await Promise.all([
    measure(
      network,
      "busy, DF",
      "Best effort goes into the middle band of three.",
      "-d",
      "DF",
      ...count,
    ),
    measure(
      network,
      "busy, EF",
      "EF goes into the same band, and gains nothing.",
      "-d",
      "EF",
      ...count,
    ),
    measure(
      network,
      "busy, ToS 0x10",
      "Low delay in the ToS byte's old reading goes into the first band.",
      "--tos",
      "0x10",
      ...count,
    ),
  ]);
}

// ─── What is shown ───────────────────────────────────────────────────────────────────────────────────────────────────

const ms = (value: number) => value.toFixed(value < 10 ? 2 : 0);

/** Each row against `reference`, in a sentence. */
function against(row: Measured, reference: Measured): string {
  const p = mannWhitney(row.total, reference.total);
  if (!(p < 0.01)) {
    return `not seen to differ from "${reference.label}" (Mann–Whitney U, p = ${p.toPrecision(2)})`;
  }
  const [ours, theirs] = [quantile(row.total, 0.5), quantile(reference.total, 0.5)];
  const [ratio, word] = ours < theirs ? [theirs / ours, "faster"] : [ours / theirs, "slower"];
  return `${ms(ratio)} times ${word} than "${reference.label}" (Mann–Whitney U, p = ${
    p.toPrecision(2)
  })`;
}

function show(rows: Measured[], reference: Measured): void {
  const longest = Math.max(...rows.map(({ total }) => quantile(total, 0.5)));
  say(
    `${"".padEnd(22)}${
      ["requests", "connect ms", "total ms", "p95"].map((name) => name.padStart(11)).join("")
    }`,
  );
  for (const { label, connect, total } of rows) {
    const median = quantile(total, 0.5);
    const cells = [
      String(total.length),
      ms(quantile(connect, 0.5)),
      ms(median),
      ms(quantile(total, 0.95)),
    ];
    const bar = "█".repeat(Math.max(1, Math.round(median / longest * 30)));
    say(`${label.padEnd(22)}${cells.map((cell) => cell.padStart(11)).join("")}  ${bar}`);
  }
  say();
  for (const row of rows) {
    say(
      `${row.label}: ${row.sentence}${
        row === reference ? "" : ` It is ${against(row, reference)}.`
      }`,
    );
  }
}

/** The rows as a picture that needs nothing else and is readable on light and dark. */
export function svg(rows: readonly Measured[], title: string): string {
  const [left, width, step, top] = [190, 420, 46, 56];
  const longest = Math.max(...rows.map(({ total }) => quantile(total, 0.5)));
  const height = top + rows.length * step + 20;
  const bars = rows.map(({ label, connect, total }, at) => {
    const [c, t] = [quantile(connect, 0.5), quantile(total, 0.5)];
    const y = top + at * step;
    const x = (value: number) => Math.max(1, value / longest * width).toFixed(1);
    return `  <text x="${left - 12}" y="${y + 19}" text-anchor="end">${label}</text>
  <rect class="total" x="${left}" y="${y}" width="${x(t)}" height="28" rx="3"/>
  <rect class="connect" x="${left}" y="${y}" width="${x(Math.min(c, t))}" height="28" rx="3"/>
  <text x="${(left + Number(x(t)) + 10).toFixed(1)}" y="${y + 19}">${ms(t)} ms</text>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${
    left + width + 110
  } ${height}" role="img" aria-label="${title}">
  <style>
    text { font: 14px system-ui, sans-serif; fill: #1f2328 }
    .title { font-weight: 600 } .total { fill: #0a7cff } .connect { fill: #f2780c }
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
  </style>
  <text class="title" x="16" y="24">${title}</text>
  <text x="16" y="44"><tspan class="connect">■</tspan> connect <tspan class="total">■</tspan> the rest of the request, median</text>
${bars.join("\n")}
</svg>
`;
}

async function play(network: Network, scene: string, file: string | undefined): Promise<number> {
  if (scene === "rewrite") {
    const changed = await rewrite(network);
    const name = (dscp: number) => describe(markOf(dscp << 2));
    say(`Of 64 code points, ${changed.size} arrived changed:`);
    for (const [sent, arrived] of changed) say(`  ${name(sent)} arrived as ${name(arrived)}`);
  } else if (scene === "pfifo") {
    const rows = await pfifo(network, 25);
    show(rows, rows[0]);
  } else {
    const rows = await bottleneck(network, 25);
    show(rows, rows[1]);
    if (file !== undefined) {
      await Deno.writeTextFile(
        file,
        svg(rows, "One GET through a busy 5 Mbit/s link, by its mark"),
      );
    }
  }
  return 0;
}

/** The path scene; its hosts go away when it is abandoned. */
async function playPath(interrupted: Promise<number>): Promise<number> {
  const runs = pathScene();
  for (;;) {
    const next = await Promise.race([runs.next(), interrupted]);
    if (typeof next === "number") return await runs.return(undefined), next;
    if (next.done) return 0;
    say(`${next.value.title}\n${next.value.stdout}exit ${next.value.code}\n`);
  }
}

async function main(args: string[]): Promise<number> {
  if (args[0] === "--sink") return await sink(), 0;
  if (args[0] === "--source") return await source(args[1]), 0;
  const scenes = ["bottleneck", "rewrite", "pfifo", "path"];
  const options = {
    scene: { type: "string", default: scenes[0] },
    svg: { type: "string" },
  } as const;
  let values: { scene: string; svg?: string };
  try {
    values = parseArgs({ args, options }).values;
    if (!scenes.includes(values.scene)) throw new Error(`--scene is one of ${scenes.join(", ")}`);
  } catch (error) {
    say(`lab: ${(error as Error).message}`);
    return 2;
  }
  const needs = [
    "root",
    "ip",
    "tc",
    "sysctl",
    ...["rewrite", "path"].includes(values.scene) ? ["nft"] : [],
  ];
  if (missing(needs).length > 0) {
    say(
      `lab: needs ${
        missing(needs).join(", ")
      }: run it as root, on a Linux with iproute2, procps and nftables`,
    );
    return 103;
  }
  const interrupted = Promise.withResolvers<number>();
  Deno.addSignalListener("SIGINT", () => interrupted.resolve(130));
  Deno.addSignalListener("SIGTERM", () => interrupted.resolve(143));
  if (values.scene === "path") return await playPath(interrupted.promise);
  await using network = await Network.create();
  const playing = play(network, values.scene, values.svg);
  // Once interrupted, the network goes away under what is still playing.
  playing.catch(() => {});
  return await Promise.race([playing, interrupted.promise]);
}

if (import.meta.main) Deno.exit(await main(Deno.args));
