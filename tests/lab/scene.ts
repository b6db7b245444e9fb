/**
 * What the scenes of the lab have in common: their parts, commands on hosts, and what is said about
 * times. Statistics and tables are those of the script.
 *
 * @module
 */

import { markOf } from "../../ffi/mod.ts";
import { comparisonText, type Row } from "../../src/series.ts";
import { compare, quantile } from "../../src/statistics.ts";
import type { Namespace } from "../support/namespaces.ts";
import { FarEnd } from "../support/servers.ts";
import {
  duration,
  type Link,
  type Picture,
  type Strips,
  type Style,
  type Topology,
} from "./plot.ts";
import { type Command, Site, type Wiring } from "./site.ts";
import { type Answer, Asking, type Plan, rowOf, sleep, type Stage, type Way } from "./traffic.ts";

// ─── Parts of a scene ────────────────────────────────────────────────────────────────────────────

/** What a scene has to show. */
export interface Shown {
  /** Lines of at most 80 columns. */
  readonly table: string;
  /** Sentences that follow from what was measured. */
  readonly sentences: readonly string[];
  readonly picture: Picture;
}

/** What the lab knows of a scene. */
export interface Scene extends About {
  /** Builds the network, measures, and removes the network, if it is not to stand. */
  play(stage: Stage, place?: Place): Promise<Played>;
}

/** The parts of a scene that are known before it is played. */
interface About<Host extends string = string> {
  readonly name: string;
  /** The concept in one sentence. */
  readonly concept: string;
  readonly wiring: Wiring<Host>;
  readonly topology: Topology;
  /** What the scene is about, on top of the wiring: when all have run, the network is built. */
  readonly commands: readonly Command<Host>[];
  /** Commands that show what the network does, while there is traffic. */
  readonly looks: readonly Command<Host>[];
  /** Commands to try, in order. `$get` is the script, `$traffic` is `traffic.ts`. */
  readonly tries: readonly Command<Host>[];
  /** Programs that it takes, and `root`. */
  readonly needs: readonly string[];
}

/** Where a scene is played: in namespaces `PREFIX-HOST`, which stand before or afterwards. */
export interface Place {
  readonly prefix: string;
  /** Whether the network stands already, and is not built. */
  readonly isStanding: boolean;
}

/** What came of a scene. */
export interface Played {
  readonly shown: Shown;
  /** The commands that built the network, as a shell takes them. */
  readonly built: readonly string[];
}

/**
 * Makes a scene of its parts. Measuring and showing are apart, to be tested apart; `measure` leaves
 * the network as `commands` built it.
 */
export function scene<Host extends string, M>(
  { measure, show, ...about }: About<Host> & {
    measure: (site: Site<Host>, stage: Stage) => Promise<M>;
    show: (measured: M) => Shown;
  },
): Scene & { build(): Promise<Site<Host>> } {
  const { wiring, commands } = about;
  const play = async (stage: Stage, place?: Place) => {
    stage.step?.("building the network", 1);
    const site = place?.isStanding
      ? await Site.standing(wiring, place.prefix)
      : await Site.build(wiring, commands, place?.prefix);
    await using stack = new AsyncDisposableStack();
    if (!place?.isStanding) stack.use(site);
    stage.signal?.throwIfAborted();
    const built = [...site.log];
    const shown = show(await endedBy(stage.signal, measure(site, stage), site.hosts));
    if (place !== undefined) stack.move();
    return { shown, built };
  };
  const build = () => Site.build(wiring, commands);
  return { ...about, build, play } as Scene & { build: typeof build };
}

/**
 * Settles as a scene's measuring does, and no later than so many seconds after the signal. Whatever
 * the scene waits for ends with its processes; it may just be starting another one.
 */
export async function endedBy<T>(
  signal: AbortSignal | undefined,
  measuring: Promise<T>,
  hosts: readonly Pick<Namespace, "kill">[],
  seconds = 10,
): Promise<T> {
  const over = Promise.withResolvers<never>();
  let isOver = false;
  const stop = async () => {
    const end = performance.now() + seconds * 1000;
    while (!isOver && performance.now() < end) {
      for (const host of hosts) await host.kill();
      await sleep(20);
    }
    over.reject(signal!.reason);
  };
  signal?.addEventListener("abort", stop);
  try {
    return await Promise.race([measuring, over.promise]);
  } finally {
    isOver = true;
    signal?.removeEventListener("abort", stop);
  }
}

/** Three hosts: what a router between two others does. */
export const THREE: Wiring<"client" | "router" | "server"> = {
  hosts: ["client", "router", "server"],
  links: [
    { left: "c0", right: "r0", ipv4: "192.0.2" },
    { left: "r1", right: "s0", ipv4: "198.51.100" },
  ],
};

/** {@linkcode THREE}, built. */
export type Network = Site<"client" | "router" | "server">;

/** A drawing of hosts in a row; the devices are those that commands name. */
export function topologyOf(
  { hosts, links }: Wiring,
  about: readonly Omit<Link, "left" | "right">[],
  traffic: string,
): Topology {
  return {
    hosts: hosts.map((name) => ({ name })),
    links: links.map(({ left, right }, at) => ({ ...about[at], left, right })),
    traffic,
  };
}

// ─── GETs to the far end ─────────────────────────────────────────────────────────────────────────

/** The URL of {@linkcode startFarEnd}. */
export const FAR_END = "http://198.51.100.2:8086/";

/** The first thing to try: the far end, with its log or without. */
export const SERVE: Command<"server"> = ["server", "$get --serve 0.0.0.0:8086 & sleep 1"];
export const SERVE_QUIETLY: Command<"server"> = [
  "server",
  "$get --silent --serve 0.0.0.0:8086 & sleep 1",
];

/** Starts the script as the far end, on the server. */
export async function startFarEnd(
  { at }: { at: { readonly server: Namespace } },
): Promise<FarEnd> {
  return await FarEnd.start("0.0.0.0:8086", at.server.under);
}

/** A way of asking, under the name that tables and pictures give it. */
export function way(name: string, tos: number, markSyn: boolean): Way {
  return { mark: { ...markOf(tos), name }, markSyn };
}

/** GETs to the far end, from the first to the last. */
export async function askAll(network: Network, plan: Omit<Plan, "url">): Promise<Answer[]> {
  await using asking = await Asking.start(network.at.client, { url: FAR_END, ...plan });
  return await asking.answers();
}

/** A row for each way, and the milliseconds of each GET; `null` without a reply. */
export interface Measured {
  readonly rows: readonly Row[];
  readonly values: readonly (readonly (number | null)[])[];
}

/** Sorts answers by way. */
export function measuredOf(ways: readonly Way[], answers: readonly Answer[]): Measured {
  const each = ways.map((_, at) => answers.filter(({ way }) => way === at));
  return {
    rows: each.map((answers, at) => rowOf(ways[at].mark, answers)),
    values: each.map((answers) => answers.map(valueOf)),
  };
}

/** The milliseconds of a GET; `null` without a reply. */
export function valueOf({ row }: Answer): number | null {
  return row.total[0] ?? null;
}

/** A panel with a strip for each row, under the name of its mark, or one that says more. */
export function stripsOf(
  styles: readonly Style[],
  { rows, values }: Measured,
  labels = rows.map(({ mark }) => mark.name!),
): Strips {
  return {
    kind: "strips",
    title: "Time for one GET: a dot each, a bar for the median",
    axis: "time for one GET, log scale",
    strips: rows.map((row, at) => ({
      label: labels[at],
      style: styles[at],
      values: values[at],
      median: quantile(row.total, 0.5),
    })),
  };
}

// ─── What is said about times ────────────────────────────────────────────────────────────────────

/** The median total time, in words. */
export function medianOf({ total }: Row): string {
  return duration(quantile(total, 0.5));
}

/**
 * How many times faster each row is than best effort, or than the first one: 1 if no difference is
 * seen, `NaN` with too few replies to see one.
 */
export function speedups(rows: readonly Row[]): number[] {
  return compare(rows).map((one) => {
    if (one === null || one.differs === false) return 1;
    return one.differs === null ? NaN : one.ratio;
  });
}

/** A factor in few digits. */
export function times(factor: number): string {
  return `${factor.toFixed(factor < 10 ? 1 : 0)} times`;
}

/** The script's verdict as one line. */
export function statistics(rows: readonly Row[]): string {
  return comparisonText(rows, Infinity).trim();
}
