/**
 * The scenes about limits: traffic shaping, and traffic policing beside it.
 *
 * @module
 */

import { type Row, table } from "../../src/series.ts";
import { quantile } from "../../src/statistics.ts";
import { type Course, duration, type Series, type Style } from "./plot.ts";
import {
  FAR_END,
  medianOf,
  type Network,
  scene,
  SERVE_QUIETLY,
  type Shown,
  speedups,
  startFarEnd,
  THREE,
  topologyOf,
  valueOf,
  way,
} from "./scene.ts";
import { type Command, serverOf } from "./site.ts";
import {
  Asking,
  LARGE_PORT,
  type Queue,
  rates,
  readQueue,
  receivedBytes,
  retransmitted,
  rowOf,
  sampling,
  serveLarge,
  type Stage,
} from "./traffic.ts";

const ENDS: readonly Command<"server">[] = [
  ["server", "ip link set dev s0 gso_max_segs 1  # packets of 1,500 bytes at most"],
  ["server", "sysctl -q -w net.ipv4.tcp_no_metrics_save=1  # forget earlier connections"],
];

const SHAPER: readonly Command<"router">[] = [
  [
    "router",
    "tc qdisc add dev r0 root handle 1: \\\n  tbf rate 2mbit burst 5kb limit 500kb",
  ],
];

const NO_SHAPER: readonly Command<"router">[] = [["router", "tc qdisc del dev r0 root"]];

const NO_POLICER: readonly Command<"router">[] = [["router", "nft delete table ip police"]];

// A limit in bytes lets the bytes of a whole second pass at once, whatever its burst.
const POLICER: readonly Command<"router">[] = [
  ["router", "nft add table ip police"],
  ["router", "nft 'add chain ip police f { type filter hook forward priority 0; }'"],
  [
    "router",
    "nft add rule ip police f oifname r0 \\\n" +
    "  limit rate over 166/second \\\n" +
    "  burst 16 packets counter drop  # 166 packets of 1,500 bytes are 2 Mbit",
  ],
];

const LARGE = `http://${serverOf(THREE).ipv4}:${LARGE_PORT}/`;

const TRIES: readonly Command<"client" | "server">[] = [
  ["server", "$traffic large 1000000 & sleep 1"],
  SERVE_QUIETLY,
  ["client", `$get ${LARGE} >/dev/null & sleep 0.3`],
  ["client", `$get -n 10 ${FAR_END}  # beside the large reply`],
];

const SEE_PACKETS: Command<"client"> = ["client", "tcpdump -ni c0 -c 40 tcp"];

/** A large reply and small GETs, through a limit or without one. */
export interface Passage {
  readonly label: string;
  /** The small GETs that began while the reply was on its way, or all if it was too brief. */
  readonly row: Row;
  /** All small GETs, by their start in seconds after the reply's. */
  readonly points: readonly (readonly [seconds: number, milliseconds: number | null])[];
  /** The reply's kilobytes and milliseconds, `NaN` if it did not come whole. */
  readonly reply: { readonly kilobytes: number; readonly milliseconds: number };
  /** Packets dropped by the limit. */
  readonly drops: number;
  /** Segments that the server sent again. */
  readonly resent: number;
  /** The longest queue seen. */
  readonly queue: { readonly packets: number; readonly bytes: number };
  /** Mbit/s that reach the client. */
  readonly throughput: readonly (readonly [seconds: number, mbits: number])[];
}

/** The size of the large reply, and for how many seconds there is a small GET every 50 ms. */
export interface PassageSize {
  readonly kilobytes: number;
  readonly seconds: number;
}

const SIZE: PassageSize = { kilobytes: 300, seconds: 4 };

/** A reply that is shorter, in milliseconds, meets too few GETs to compare. */
const BRIEF = 500;

async function pass(
  network: Network,
  label: string,
  { kilobytes, seconds }: PassageSize,
  stage: Stage,
): Promise<Passage> {
  stage.step?.(`a ${kilobytes} kB reply and small GETs, ${label}`, seconds + 1);
  const { router, client, server } = network.at;
  await using farEnd = await startFarEnd(network);
  await using _large = await serveLarge(server, kilobytes * 1000);
  const small = way(label, 0, false);
  await using asking = await Asking.start(client, {
    url: FAR_END,
    ways: [small],
    every: 50,
    ticks: seconds * 20,
    maxTime: 10,
    large: { url: LARGE, after: 500 },
  });
  const drops = await dropsOf(network), resent = retransmitted(farEnd.process);
  const { samples, result: answers } = await sampling(
    async () => ({
      bytes: receivedBytes(asking.process, "c0"),
      queue: await readQueue(router, "r0"),
    }),
    () => asking.answers(),
    stage.signal,
  );
  const reply = answers.find(({ way }) => way === -1)!;
  const others = answers.filter(({ way }) => way === 0);
  const milliseconds = valueOf(reply) ?? NaN;
  const during = others.filter(({ from }) => from >= reply.from && from < reply.to);
  const longest = (of: (queue: Queue) => number) =>
    Math.max(...samples.map(({ value: { queue } }) => of(queue)));
  return {
    label,
    row: rowOf(small.mark, milliseconds < BRIEF ? others : during),
    points: others.map((answer) => [(answer.from - reply.from) / 1000, valueOf(answer)]),
    reply: { kilobytes, milliseconds },
    drops: await dropsOf(network) - drops,
    resent: retransmitted(farEnd.process) - resent,
    queue: { packets: longest(({ qlen }) => qlen), bytes: longest(({ backlog }) => backlog) },
    throughput: rates(samples.map(({ at, value }) => ({ at, value: value.bytes })), reply.from),
  };
}

/** Packets that shaper and policer have dropped, those that are there. */
async function dropsOf({ at: { router } }: Network): Promise<number> {
  const { stdout } = await router.run("nft", "list", "ruleset");
  const policed = Number(/counter packets (\d+)/.exec(stdout)?.[1] ?? 0);
  return policed + (await readQueue(router, "r0")).drops;
}

/** Shows passages in two tables. */
function passageTable(passages: readonly Passage[]): string {
  const lines = [
    ["", "", "mean", "packets", "packets", "longest", "queue"],
    ["", "reply", "Mbit/s", "dropped", "resent", "packets", "kB"],
    ...passages.map(({ label, reply: { kilobytes, milliseconds }, drops, resent, queue }) => {
      const rate = kilobytes * 8 / milliseconds;
      return [
        label,
        duration(milliseconds),
        Number.isNaN(rate) ? "-" : rate.toFixed(rate < 10 ? 2 : 0),
        ...[drops, resent, queue.packets].map(String),
        (queue.bytes / 1000).toFixed(0),
      ];
    }),
  ].map(([label, ...cells]) => label.padEnd(12) + cells.map((cell) => cell.padStart(10)).join(""));
  const small = table(passages.map(({ row }) => row), 80);
  return `${lines.join("\n")}\n\nSmall GETs meanwhile:\n${small}`;
}

const SINCE = "seconds since the large reply was asked for";

/** Draws two passages over each other; the second one's reply is shaded. */
function passagePanels(passages: readonly Passage[], styles: readonly Style[]): Course[] {
  const ends = passages.map(({ reply: { milliseconds }, points }) =>
    Number.isNaN(milliseconds) ? Math.max(...points.map(([at]) => at)) : milliseconds / 1000
  );
  const from = -0.5, to = Math.max(2, Math.ceil(Math.max(...ends) * 2 + 0.5) / 2);
  const visible = <T>(points: readonly (readonly [seconds: number, value: T])[]) =>
    points.filter(([seconds]) => seconds >= from && seconds <= to);
  const shaded = { from: 0, to: ends[1], label: `${passages[1].label} reply on its way` };
  const course = { kind: "course", from, to, shaded } as const;
  return [
    {
      ...course,
      title: "What reaches the client: the mean of each 100 ms",
      axes: { x: SINCE, y: "Mbit/s" },
      unit: "Mbit/s",
      series: passages.map(({ label, throughput, reply }, at) => ({
        label: `${label}: the reply takes ${duration(reply.milliseconds)}`,
        style: styles[at],
        points: visible(throughput),
        isLine: true,
      })),
    },
    {
      ...course,
      title: "Time for one small GET, by its start; ✕ is no reply",
      axes: { x: SINCE, y: "time, log scale" },
      unit: "ms",
      series: passages.map(({ label, points, row, reply }, at): Series => ({
        label: `${label}: median ${medianOf(row)}`,
        style: styles[at],
        points: visible(points),
        medians: [[0, reply.milliseconds < BRIEF ? to : ends[at], quantile(row.total, 0.5)]],
      })),
    },
  ];
}

function took({ reply: { milliseconds } }: Passage): string {
  return Number.isNaN(milliseconds) ? "did not come whole" : `took ${duration(milliseconds)}`;
}

// ─── shaping ─────────────────────────────────────────────────────────────────────────────────────

/** A large reply and small GETs through a shaper, then without a limit. */
export async function measureShaping(
  network: Network,
  stage: Stage = {},
  size = SIZE,
): Promise<[free: Passage, shaped: Passage]> {
  const shaped = await pass(network, "shaped", size, stage);
  await network.apply(NO_SHAPER);
  const free = await pass(network, "no limit", size, stage);
  await network.apply(SHAPER);
  return [free, shaped];
}

/** Shows what the shaper did. */
export function showShaping([free, shaped]: readonly [free: Passage, shaped: Passage]): Shown {
  const { queue: { packets, bytes }, drops, reply: { kilobytes } } = shaped;
  const [, faster] = speedups([shaped.row, free.row]);
  const sentences = [
    `Without a limit, the ${kilobytes} kB reply ${took(free)}; shaped, it ${took(shaped)}.`,
    `${
      packets > 0
        ? `Up to ${packets} packets (${(bytes / 1000).toFixed(0)} kB) waited in the queue`
        : "No packet was seen waiting in the queue"
    }; ${drops === 0 ? "none was dropped" : `${drops} were dropped, as the queue was full`}.`,
  ];
  if (faster > 1) {
    const medians = `${medianOf(shaped.row)} instead of ${medianOf(free.row)}`;
    sentences.push(`Small GETs waited behind the reply: ${medians}.`);
  } else if (!Number.isNaN(faster)) sentences.push("Small GETs did not wait behind the reply.");
  return {
    table: passageTable([free, shaped]),
    sentences,
    picture: {
      title: "Traffic shaping: a large reply through 2 Mbit/s",
      description: sentences.join(" "),
      topology: SHAPING.topology,
      panels: passagePanels([free, shaped], [3, 0]),
    },
  };
}

/** What is above the rate waits. */
export const SHAPING = scene({
  name: "shaping",
  concept: "Traffic shaping: packets above the rate wait in a queue; none is lost, and " +
    "everything behind them waits too.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{ label: "2 Mbit/s", note: "the rest waits", queue: "right" }, {}],
    "← a 300 kB reply and small ones; they queue in the router",
  ),
  commands: [...ENDS, ...SHAPER],
  looks: [
    ["router", "tc -s qdisc show dev r0  # backlog is what waits"],
    SEE_PACKETS,
  ],
  tries: [...TRIES, ...NO_SHAPER, ...TRIES.slice(2), ...SHAPER],
  needs: ["root", "ip", "tc", "nft", "sysctl"],
  measure: measureShaping,
  show: showShaping,
});

// ─── policing ────────────────────────────────────────────────────────────────────────────────────

/** A large reply and small GETs through a policer, then through a shaper of the same rate. */
export async function measurePolicing(
  network: Network,
  stage: Stage = {},
  size = SIZE,
): Promise<[shaped: Passage, policed: Passage]> {
  const policed = await pass(network, "policed", size, stage);
  await network.apply([...NO_POLICER, ...SHAPER]);
  const shaped = await pass(network, "shaped", size, stage);
  await network.apply([...NO_SHAPER, ...POLICER]);
  return [shaped, policed];
}

/** Shows what the policer did, beside the shaper. */
export function showPolicing(
  [shaped, policed]: readonly [shaped: Passage, policed: Passage],
): Shown {
  const ratio = policed.reply.milliseconds / shaped.reply.milliseconds;
  const [, faster] = speedups([shaped.row, policed.row]);
  const medians = `${medianOf(policed.row)}, and ${medianOf(shaped.row)} shaped`;
  const sentences = [
    policed.drops === 0
      ? "The policer dropped nothing this time."
      : `The policer dropped ${policed.drops} packets, and the server sent ${policed.resent} ` +
        `again; the shaper dropped ${shaped.drops}.`,
    `Policed, the reply ${took(policed)}; shaped, it ${took(shaped)}${
      ratio > 1.05 ? ": what is dropped has to be sent again" : ""
    }.`,
  ];
  if (faster > 1) {
    sentences.push(`Small GETs took ${medians}: a policer has no queue to wait in.`);
  } else if (faster < 1) sentences.push(`Small GETs were slower policed: ${medians}.`);
  else if (faster === 1) sentences.push("Small GETs took as long policed as shaped.");
  return {
    table: passageTable([shaped, policed]),
    sentences,
    picture: {
      title: "Traffic policing beside shaping, both at 2 Mbit/s",
      description: sentences.join(" "),
      topology: POLICING.topology,
      panels: passagePanels([shaped, policed], [0, 1]),
    },
  };
}

/** What is above the rate is dropped. */
export const POLICING = scene({
  name: "policing",
  concept: "Traffic policing: packets above the rate are dropped at once; nothing waits, and " +
    "the sender has to send them again.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{ label: "2 Mbit/s", note: "the rest is lost", drop: "right" }, {}],
    "← a 300 kB reply and small ones: policed, then shaped",
  ),
  commands: [...ENDS, ...POLICER],
  looks: [
    ["router", "nft list table ip police  # counter is what was dropped"],
    ["server", "nstat -az TcpRetransSegs"],
    SEE_PACKETS,
  ],
  tries: [
    ...TRIES,
    ...NO_POLICER,
    ...SHAPER,
    ...TRIES.slice(2),
    ...NO_SHAPER,
    ...POLICER,
  ],
  needs: ["root", "ip", "tc", "nft", "sysctl"],
  measure: measurePolicing,
  show: showPolicing,
});
