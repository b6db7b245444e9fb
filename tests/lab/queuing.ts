/**
 * The scenes about queues: priority queuing, a call beside a download, and ToS and DSCP in
 * pfifo_fast.
 *
 * @module
 */

import { table } from "../../src/series.ts";
import { quantile } from "../../src/statistics.ts";
import { duration, type Series } from "./plot.ts";
import {
  askAll,
  FAR_END,
  type Measured,
  measuredOf,
  medianOf,
  type Network,
  scene,
  SERVE_QUIETLY,
  type Shown,
  speedups,
  startFarEnd,
  statistics,
  stripsOf,
  THREE,
  times,
  topologyOf,
  valueOf,
  way,
} from "./scene.ts";
import { type Command, serverOf } from "./site.ts";
import {
  type Answer,
  Asking,
  Bulk,
  fillQueue,
  rates,
  receivedBytes,
  rowOf,
  sampling,
  sleep,
  type Stage,
} from "./traffic.ts";

/** How many packets the queue of the bottleneck holds. */
const QUEUE = 200;

/** GETs with each mark: how many, and the milliseconds between two. */
export interface Pace {
  readonly ticks: number;
  readonly every: number;
}

const WORDS = "DF: Default Forwarding, no mark. EF: Expedited Forwarding, 0xB8.";

const PACE: Pace = { ticks: 40, every: 100 }, MAX_TIME = 10;

const SMALL_QUEUE: readonly Command<"client" | "router">[] = [
  ["client", "ip link set dev c0 gso_max_segs 1  # packets of 1,500 bytes at most"],
  ["router", `ip link set dev r1 txqueuelen ${QUEUE}`],
];

const SERVER = serverOf(THREE).ipv4;

const BULK: readonly Command<"client" | "server">[] = [
  ["server", "$traffic sink & sleep 1"],
  ["client", `$traffic source ${SERVER} & sleep 3  # four flows: they fill the queue`],
];

const SEE_MARKS: Command<"router"> = ["router", "tcpdump -ni r1 -v -c 20 tcp port 8086"];

/** Starts bulk flows, and waits until the queue is half full. */
async function startBulk({ at }: Network, stage: Stage): Promise<Bulk> {
  stage.step?.("bulk flows fill the queue", 2);
  const bulk = await Bulk.start(at.client, at.server, SERVER);
  try {
    await fillQueue(at.router, "r1", QUEUE / 2, stage.signal);
    return bulk;
  } catch (error) {
    await bulk[Symbol.asyncDispose]();
    throw error;
  }
}

// ─── priority ────────────────────────────────────────────────────────────────────────────────────

const BOTTLENECK: readonly Command<"client" | "router">[] = [
  ...SMALL_QUEUE,
  ["router", "tc qdisc add dev r1 root handle 1: htb default 20"],
  ["router", "tc class add dev r1 parent 1: classid 1:1 htb rate 5mbit"],
  ["router", "tc class add dev r1 parent 1:1 classid 1:10 htb rate 2mbit ceil 5mbit prio 0"],
  ["router", "tc class add dev r1 parent 1:1 classid 1:20 htb rate 3mbit ceil 5mbit prio 1"],
  // EF is 0xB8, and the two ECN bits do not count.
  [
    "router",
    "tc filter add dev r1 parent 1: protocol ip u32 \\\n  match ip dsfield 0xb8 0xfc flowid 1:10",
  ],
];

const SEE_CLASSES: readonly Command<"router">[] = [
  ["router", "tc -s class show dev r1  # 1:10 is EF, 1:20 is all else"],
  SEE_MARKS,
];

const IDLE = [way("DF, idle", 0, false)];
const BUSY = [way("DF", 0, false), way("EF", 0xb8, false), way("EF --mark-syn", 0xb8, true)];

/** What the picture calls them. */
const LABELS = ["DF, link idle", "DF", "EF, but not the SYN", "EF, SYN too"];

/** Asks through an idle link, and through a busy one in three ways. */
export async function measurePriority(
  network: Network,
  stage: Stage = {},
  { ticks, every }: Pace = PACE,
): Promise<Measured> {
  await using _server = await startFarEnd(network);
  const ask = async (ways: typeof IDLE, every: number) =>
    measuredOf(ways, await askAll(network, { ways, ticks, every, maxTime: MAX_TIME }));
  stage.step?.("GETs on an idle link", ticks * every / 2000 + 1);
  const idle = await ask(IDLE, every / 2);
  await using _bulk = await startBulk(network, stage);
  // Side by side, so that all of them meet the same queue.
  stage.step?.("GETs on the busy link, in three ways", ticks * every / 1000 + 2);
  const busy = await ask(BUSY, every);
  return { rows: [...idle.rows, ...busy.rows], values: [...idle.values, ...busy.values] };
}

/** Shows what the bottleneck did to each way of asking. */
export function showPriority(measured: Measured): Shown {
  const { rows } = measured, [idle, df, ef, syn] = rows;
  const [, slowed] = speedups([df, idle]);
  const [, , gained] = speedups([df, ef, syn]);
  const [, late] = speedups([ef, syn]);
  const sentences: string[] = [];
  if (slowed > 1) {
    sentences.push(
      `The bulk flows make an unmarked GET ${times(slowed)} slower: ${medianOf(idle)} on the ` +
        `idle link, ${medianOf(df)} on the busy one.`,
    );
  } else if (!Number.isNaN(slowed)) {
    sentences.push("The bulk flows did not slow an unmarked GET: there was no queue to overtake.");
  }
  if (gained > 1) {
    sentences.push(
      `With EF on every packet it takes ${medianOf(syn)}: ${times(gained)} faster than DF.`,
    );
  } else if (!Number.isNaN(gained)) sentences.push("EF on every packet gained nothing this time.");
  if (late > 1) {
    const connect = duration(quantile(ef.connect, 0.5));
    sentences.push(
      `With EF only after connect it takes ${medianOf(ef)}, of which ${connect} to connect: the ` +
        "unmarked SYN waits in the queue.",
    );
  }
  sentences.push(statistics([df, ef, syn]));
  return {
    table: table(rows, 80),
    sentences,
    picture: {
      title: "Priority queuing: one GET through a busy 5 Mbit/s link",
      description: sentences.join(" "),
      topology: PRIORITY.topology,
      words: WORDS,
      panels: [stripsOf([3, 0, 2, 1], measured, LABELS)],
    },
  };
}

/** EF overtakes bulk flows. */
export const PRIORITY = scene({
  name: "priority",
  concept: "Priority queuing: a router sends the packets of one class before all others, so a " +
    "marked packet does not wait behind a download.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{}, { label: "5 Mbit/s", note: "EF goes first", queue: "left" }],
    "→ four bulk flows and the GETs; they queue in the router",
  ),
  commands: BOTTLENECK,
  looks: SEE_CLASSES,
  tries: [
    SERVE_QUIETLY,
    ...BULK,
    ["client", `$get -n 20 -d DF,EF ${FAR_END}`],
    ["client", `$get -n 20 -d DF,EF --mark-syn ${FAR_END}`],
    ["router", "tc filter del dev r1 parent 1:  # EF is like all else now"],
    ["client", `$get -n 20 -d DF,EF --mark-syn ${FAR_END}`],
  ],
  needs: ["root", "ip", "tc", "sysctl"],
  measure: measurePriority,
  show: showPriority,
});

// ─── call ────────────────────────────────────────────────────────────────────────────────────────

/** Seconds of a call, and when the download begins and ends in it. */
export interface CallTimes {
  readonly seconds: number;
  readonly from: number;
  readonly to: number;
}

/** What a call met. Seconds count from its first GET. */
export interface Call {
  readonly answers: readonly Answer[];
  /** The first GET, in milliseconds since 1970. */
  readonly began: number;
  readonly seconds: number;
  readonly download: { readonly from: number; readonly to: number };
  /** Mbit/s that reach the far end. */
  readonly load: readonly (readonly [seconds: number, mbits: number])[];
}

const CALLERS = [way("DF", 0, false), way("EF", 0xb8, true)];

/** A GET with each mark every 100 ms, and a download meanwhile. */
export async function measureCall(
  network: Network,
  stage: Stage = {},
  { seconds, from, to }: CallTimes = { seconds: 20, from: 5, to: 15 },
): Promise<Call> {
  await using farEnd = await startFarEnd(network);
  const plan = { url: FAR_END, ways: CALLERS, every: 100, ticks: seconds * 10, maxTime: 3 };
  await using asking = await Asking.start(network.at.client, plan);
  const { began } = asking, since = () => (Date.now() - began) / 1000;
  const until = (second: number) => sleep((second - since()) * 1000, stage.signal);
  const listen = async () => {
    stage.step?.("a call alone", from);
    await until(from);
    const download = { from, to };
    {
      await using _bulk = await Bulk.start(network.at.client, network.at.server, SERVER);
      download.from = since();
      stage.step?.("a call beside a download", to - from);
      await until(to);
      download.to = since();
    }
    stage.step?.("a call alone again", seconds - to);
    return { download, answers: await asking.answers() };
  };
  const read = () => receivedBytes(farEnd.process, "s0");
  const { samples, result } = await sampling(read, listen, stage.signal);
  return { ...result, began, seconds, load: rates(samples, began) };
}

/** Sorts the GETs of a call by mark, and each mark's by whether the download ran when they began. */
export function phasesOf({ answers, began, seconds, download }: Call) {
  const phases = [
    { name: "before", from: 0, to: download.from },
    { name: "during", from: download.from, to: download.to },
    { name: "after", from: download.to, to: seconds },
  ];
  return CALLERS.map(({ mark }, at) => {
    const own = answers.filter(({ way }) => way === at).map((answer) => ({
      answer,
      second: (answer.from - began) / 1000,
    }));
    const rows = phases.map(({ name, from, to }) => {
      const inside = own.filter(({ second }) => second >= from && second < to);
      const label = `${mark.name} ${name}`;
      return rowOf({ ...mark, name: label }, inside.map(({ answer }) => answer));
    });
    const medians = rows.map(({ total }, at) =>
      [phases[at].from, phases[at].to, quantile(total, 0.5)] as const
    );
    const points = own.map(({ answer, second }) => [second, valueOf(answer)] as const);
    return { mark, rows, medians, points };
  });
}

/** Shows what the download did to the call. */
export function showCall(call: Call): Shown {
  const { seconds, download, load } = call, callers = phasesOf(call);
  const [df, ef] = callers.map(({ rows }) => rows);
  const sentences = callers.map(({ mark, rows: [before, during] }) => {
    const medians = `${medianOf(before)} before the download, ${medianOf(during)} during it`;
    const [, slowed] = speedups([during, before]);
    const change = slowed > 1
      ? `${times(slowed)} slower`
      : Number.isNaN(slowed)
      ? "too few replies to compare"
      : "the download did not slow it";
    return `${mark.name}: ${medians}: ${change}.`;
  });
  const [, gained] = speedups([df[1], ef[1]]);
  if (gained > 1) {
    sentences.push(`During the download, EF made the call ${times(gained)} faster than DF.`);
  } else if (!Number.isNaN(gained)) sentences.push("EF gained nothing during the download.");
  sentences.push(statistics([df[1], ef[1]]));
  const course = {
    kind: "course",
    from: 0,
    to: seconds,
    shaded: { ...download, label: "download" },
  } as const;
  return {
    table: table([...df, ...ef], 80),
    sentences,
    picture: {
      title: "A call beside a download, on a 5 Mbit/s link",
      description: sentences.join(" "),
      topology: CALL.topology,
      words: WORDS,
      panels: [
        {
          ...course,
          title: "Time for one GET; ✕ is no reply within 3 s",
          axes: { x: "start of the GET, in seconds of the call", y: "time, log scale" },
          unit: "ms",
          series: callers.map(({ mark, rows, medians, points }, at): Series => ({
            label: `${mark.name}: median ${rows.map(medianOf).join(", then ")}`,
            style: at === 0 ? 0 : 1,
            points,
            medians,
          })),
        },
        {
          ...course,
          title: "What reaches the far end: the mean of each 100 ms",
          axes: { x: "seconds of the call", y: "Mbit/s" },
          unit: "Mbit/s",
          series: [{ label: "all traffic", style: 3, points: load, isLine: true }],
        },
      ],
    },
  };
}

/** A call beside a download. */
export const CALL = scene({
  name: "call",
  concept: "A video call beside a big download: both share one narrow link, and the mark decides " +
    "which of them waits.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{}, { label: "5 Mbit/s", note: "EF goes first", queue: "left" }],
    "→ the call: a GET every 100 ms; the download: four flows",
  ),
  commands: BOTTLENECK,
  looks: SEE_CLASSES,
  tries: [
    SERVE_QUIETLY,
    ["client", `$get -n 20 -d DF,EF --mark-syn ${FAR_END}`],
    ...BULK,
    ["client", `$get -n 20 -d DF,EF --mark-syn ${FAR_END}`],
  ],
  needs: ["root", "ip", "tc", "sysctl"],
  measure: measureCall,
  show: showCall,
});

// ─── tos ─────────────────────────────────────────────────────────────────────────────────────────

const PFIFO_FAST: readonly Command<"client" | "router">[] = [
  ...SMALL_QUEUE,
  ["router", "tc qdisc add dev r1 root handle 1: tbf rate 5mbit burst 5kb limit 1mb"],
  ["router", "tc qdisc add dev r1 parent 1:1 handle 10: pfifo_fast"],
];

const READINGS = [way("DF", 0, true), way("EF", 0xb8, true), way("ToS 0x10", 0x10, true)];

/** Asks through pfifo_fast: EF beside DF and the old ToS 0x10, "low delay". */
export async function measureTos(
  network: Network,
  stage: Stage = {},
  { ticks, every }: Pace = PACE,
): Promise<Measured> {
  await using _server = await startFarEnd(network);
  await using _bulk = await startBulk(network, stage);
  stage.step?.("GETs on the busy link, with three marks", ticks * every / 1000 + 3);
  const plan = { ways: READINGS, ticks, every, maxTime: MAX_TIME };
  return measuredOf(READINGS, await askAll(network, plan));
}

/** Shows what the queue did to the two readings of the byte. */
export function showTos(measured: Measured): Shown {
  const { rows } = measured, [df, ef, low] = rows;
  const [, expedited, lowDelay] = speedups(rows);
  const sentences: string[] = [];
  if (expedited === 1) {
    const medians = `${medianOf(ef)}, and DF ${medianOf(df)}`;
    sentences.push(`EF gains nothing: the queue puts it into the band of DF (${medians}).`);
  } else if (expedited > 1) {
    sentences.push(`EF was ${times(expedited)} faster than DF this time.`);
  } else if (expedited < 1) {
    sentences.push(`EF was ${times(1 / expedited)} slower than DF this time.`);
  }
  if (lowDelay > 1) {
    sentences.push(
      `ToS 0x10, "low delay" in the old reading, goes into the first band: ${medianOf(low)}, ` +
        `${times(lowDelay)} faster than DF.`,
    );
  } else if (!Number.isNaN(lowDelay)) {
    sentences.push('ToS 0x10, "low delay" in the old reading, gained nothing this time.');
  }
  sentences.push(statistics(rows));
  return {
    table: table(rows, 80),
    sentences,
    picture: {
      title: "ToS and DSCP: pfifo_fast reads the old bits",
      description: sentences.join(" "),
      topology: TOS.topology,
      words: WORDS,
      panels: [stripsOf([0, 1, 2], measured)],
    },
  };
}

/** Two readings of one byte. */
export const TOS = scene({
  name: "tos",
  concept: "ToS and DSCP are two readings of one byte: pfifo_fast, a default queue of Linux, " +
    "still sorts by the old ToS bits.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{}, { label: "5 Mbit/s", note: "pfifo_fast", queue: "left" }],
    "→ four bulk flows and the GETs; three bands in the router",
  ),
  commands: PFIFO_FAST,
  looks: [
    ["router", "tc -s qdisc show dev r1"],
    SEE_MARKS,
  ],
  tries: [
    SERVE_QUIETLY,
    ...BULK,
    ["client", `$get -n 20 -d DF,EF,4 --mark-syn ${FAR_END}  # 4 is ToS 0x10`],
  ],
  needs: ["root", "ip", "tc", "sysctl"],
  measure: measureTos,
  show: showTos,
});
