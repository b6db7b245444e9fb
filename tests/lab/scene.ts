/**
 * What the scenes of the lab have in common: their parts, commands on hosts, and what is said about
 * times. Statistics and tables are those of the script.
 *
 * @module
 */

import { markOf } from "../../ffi/mod.ts";
import { comparisonText, type Row } from "../../src/series.ts";
import { compare, quantile } from "../../src/statistics.ts";
import { type Namespace, type Network, SERVER } from "../support/namespaces.ts";
import { duration, type Picture, type Strips, type Style, type Topology } from "./plot.ts";
import { FarEnd } from "../support/servers.ts";
import { type Answer, Asking, type Plan, rowOf, sleep, type Stage, type Way } from "./traffic.ts";

// ─── Parts of a scene ────────────────────────────────────────────────────────────────────────────

/** A command, and the host on which it runs. */
export type Command<Host extends string = string> = readonly [host: Host, line: string];

/** What a scene has to show. */
export interface Shown {
  /** Lines of at most 80 columns. */
  readonly table: string;
  /** Sentences that follow from what was measured. */
  readonly sentences: readonly string[];
  readonly picture: Picture;
}

/** What the lab knows of a scene. */
export interface Scene {
  readonly name: string;
  /** The concept in one sentence. */
  readonly concept: string;
  readonly topology: Topology;
  readonly commands: readonly Command[];
  /** Programs that it takes, and `root`. */
  readonly needs: readonly string[];
  /** Builds the network, measures, and removes the network. */
  play(stage: Stage): Promise<Shown>;
}

/** A network of namespaces. */
interface Place extends AsyncDisposable {
  readonly hosts: readonly Namespace[];
}

/** Makes a scene of its parts. Measuring and showing are apart, to be tested apart. */
export function scene<P extends Place, M>(
  { create, measure, show, ...rest }: Omit<Scene, "play"> & {
    create: () => Promise<P>;
    measure: (place: P, stage: Stage) => Promise<M>;
    show: (measured: M) => Shown;
  },
): Scene {
  const play = async (stage: Stage) => {
    stage.step?.("building the network", 1);
    await using place = await create();
    stage.signal?.throwIfAborted();
    let isOver = false;
    const measuring = measure(place, stage).finally(() => isOver = true);
    // Whatever the scene waits for ends with the processes; it may just be starting another one.
    stage.signal?.addEventListener("abort", async () => {
      while (!isOver) {
        for (const host of place.hosts) await host.kill();
        await sleep(20);
      }
    });
    return show(await measuring);
  };
  return { ...rest, play };
}

/** Runs commands on their hosts. */
export async function apply<Host extends string>(
  place: Readonly<Record<Host, Namespace>>,
  commands: readonly Command<Host>[],
): Promise<void> {
  for (const [host, line] of commands) await place[host].run("sh", "-c", line);
}

// ─── GETs to the far end ─────────────────────────────────────────────────────────────────────────

/** The URL of {@linkcode startFarEnd}. */
export const FAR_END = `http://${SERVER.ipv4}:8086/`;

/** Starts the script as the far end, on the server. */
export async function startFarEnd({ server }: Network): Promise<FarEnd> {
  return await FarEnd.start("0.0.0.0:8086", server.under);
}

/** A way of asking, under the name that tables and pictures give it. */
export function way(name: string, tos: number, markSyn: boolean): Way {
  return { mark: { ...markOf(tos), name }, markSyn };
}

/** GETs to the far end, from the first to the last. */
export async function askAll(network: Network, plan: Omit<Plan, "url">): Promise<Answer[]> {
  await using asking = await Asking.start(network.client, { url: FAR_END, ...plan });
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

/** A panel with a strip for each row. */
export function stripsOf(styles: readonly Style[], { rows, values }: Measured): Strips {
  return {
    kind: "strips",
    title: "Time for one GET, one dot each; the bar is the median",
    strips: rows.map((row, at) => ({
      label: row.mark.name!,
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
