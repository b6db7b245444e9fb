/**
 * The scenes about what arrives: what the far end sees behind NAT and behind a router that bleaches,
 * and a router that drops what is marked.
 *
 * @module
 */

import { describe, markOf } from "../../ffi/mod.ts";
import { plural, wrap } from "../../src/text.ts";
import type { Namespace } from "../support/namespaces.ts";
import { dscpGet } from "../support/processes.ts";
import {
  FAR_END,
  type Network,
  scene,
  SERVE,
  type Shown,
  startFarEnd,
  THREE,
  topologyOf,
} from "./scene.ts";
import type { Command, Site, Wiring } from "./site.ts";
import type { Stage } from "./traffic.ts";

/** One run of the script. */
export interface Run {
  readonly title: string;
  /** What it prints for a person. */
  readonly text: string;
  readonly code: number;
  /** Its JSON. */
  readonly json: {
    /** What the far end reports: bytes, `null` if it does not; the client's address behind NAT. */
    readonly arrived: null | {
      readonly syn: number | null;
      readonly data: number | null;
      readonly nat: string | null;
    };
    /** When it was connected, and when it had the reply; `null` if it did not come so far. */
    readonly milliseconds: { readonly connect: number | null; readonly firstByte: number | null };
    readonly sent: { readonly repeats: number };
  };
}

/** Runs the script twice on a host, at once: for people, and for its JSON. */
async function runOn(client: Namespace, title: string, options: string): Promise<Run> {
  const args = [...options.split(" "), FAR_END];
  const [{ stderr, code }, { stdout }] = await Promise.all([
    dscpGet(args, client),
    dscpGet([...args, "--json"], client),
  ]);
  return { title, text: stderr.trimEnd(), code, json: JSON.parse(stdout) };
}

/** The reports of runs, one below the other, in lines of at most 80 columns. */
function runsText(runs: readonly Run[]): string {
  return runs.map(({ title, text, code }) => `${title} (exit ${code}):\n${linesOf(text)}\n`)
    .join("\n");
}

function linesOf(text: string): string {
  return text.split("\n").map((line) => line.length > 80 ? wrap(line, 80).trimEnd() : line)
    .join("\n");
}

function panelsOf(runs: readonly Run[]) {
  return runs.map(({ title, text, code }) => ({
    kind: "lines",
    title: `${title}: exit ${code}`,
    lines: linesOf(text).split("\n"),
  } as const));
}

// ─── arrival ─────────────────────────────────────────────────────────────────────────────────────

/** A client behind NAT, whose provider has a router. */
const HOME: Wiring<"client" | "nat" | "router" | "server"> = {
  hosts: ["client", "nat", "router", "server"],
  links: [
    { left: "c0", right: "n0", ipv4: "192.168.1" },
    { left: "n1", right: "r0", ipv4: "192.0.2" },
    { left: "r1", right: "s0", ipv4: "198.51.100" },
  ],
};

const NAT: readonly Command<"nat">[] = [
  ["nat", "nft add table ip nat"],
  ["nat", "nft 'add chain ip nat p { type nat hook postrouting priority srcnat; }'"],
  ["nat", "nft add rule ip nat p oifname n1 masquerade"],
];

const BLEACH: readonly Command<"router">[] = [
  ["router", "nft add table ip bleach"],
  ["router", "nft 'add chain ip bleach f { type filter hook forward priority mangle; }'"],
  ["router", "nft add rule ip bleach f iifname r0 ip dscp set cs0"],
];

const NO_NAT: readonly Command<"nat">[] = [["nat", "nft delete table ip nat"]];
const NO_BLEACH: readonly Command<"router">[] = [["router", "nft delete table ip bleach"]];

/** What the script reports, and the far end's log. */
export interface Arrivals {
  readonly runs: readonly Run[];
  readonly log: string;
}

/** Asks with EF: with nothing on the way, through NAT, and through NAT and a router that bleaches. */
export async function measureArrival(
  site: Site<"client" | "nat" | "router" | "server">,
  stage: Stage = {},
): Promise<Arrivals> {
  const { client, server } = site.at, runs: Run[] = [];
  await using farEnd = await startFarEnd({ at: { server } });
  const log: string[] = [];
  const ask = async (title: string) => {
    stage.step?.(`one GET with EF, ${title[0].toLowerCase() + title.slice(1)}`, 1);
    const run = await runOn(client, title, "-d EF -m 5");
    runs.push(run);
    const port = /^connected +\S+:(\d+) /m.exec(run.text)?.[1];
    if (port === undefined) return;
    const line = new RegExp(`^.*:${port} GET .*$`, "m");
    log.push(line.exec(await farEnd.process.until((said) => line.test(said), 10))![0]);
  };
  await site.apply([...NO_NAT, ...NO_BLEACH]);
  await ask("Nothing on the way");
  await site.apply(NAT);
  await ask("Through NAT");
  await site.apply(BLEACH);
  await ask("Through NAT and a router that bleaches");
  return { runs, log: log.join("\n") };
}

/** Shows what arrived, as the far end saw it. */
export function showArrival({ runs, log }: Arrivals): Shown {
  const sentences = runs.map(({ title, code, json: { arrived } }) => {
    if (arrived === null) return `${title}, nothing is known of what arrived (exit ${code}).`;
    const { data, nat } = arrived;
    const what = data === null
      ? "the far end does not report the request's mark"
      : data >> 2 === EF.dscp
      ? `the request arrived with ${describe(markOf(data))}, as it was sent`
      : `the request arrived with ${describe(markOf(data))}, not with ${describe(EF)}`;
    const who = nat === null ? "" : `; the far end sees the address ${nat.replace(/:\d+$/, "")}`;
    return `${title}, ${what}${who} (exit ${code}).`;
  });
  return {
    table: `${runsText(runs)}\nThe far end's log:\n${log}\n`,
    sentences,
    picture: {
      title: "What arrives, as the far end sees it",
      description: sentences.join(" "),
      topology: ARRIVAL.topology,
      panels: [
        ...panelsOf(runs),
        { kind: "lines", title: "The far end's log", lines: log.split("\n") },
      ],
      words: WORDS,
    },
  };
}

const EF = markOf(0xb8);
const WORDS = "EF: Expedited Forwarding, 0xB8. 0x00: DF, Default Forwarding.";

/** The far end's eyes: NAT and bleaching. */
export const ARRIVAL = scene({
  name: "arrival",
  concept:
    "What left is not what arrives: NAT changes addresses and leaves marks alone, a router " +
    "that bleaches clears marks; only the far end can tell.",
  wiring: HOME,
  topology: topologyOf(
    HOME,
    [{}, { label: "NAT" }, { label: "EF → 0x00" }],
    "→ a GET with EF; the far end reports what reached it",
  ),
  commands: [...NAT, ...BLEACH],
  looks: [
    ["client", "tcpdump -ni c0 -v -c 10 tcp port 8086  # as it was sent"],
    ["router", "tcpdump -ni r0 -v -c 10 tcp port 8086  # behind NAT"],
    ["server", "tcpdump -ni s0 -v -c 10 tcp port 8086  # as it arrives"],
  ],
  tries: [
    SERVE,
    ["client", `$get -d EF ${FAR_END}`],
    ...NO_BLEACH,
    ["client", `$get -d EF ${FAR_END}`],
    ...NO_NAT,
    ["client", `$get -d EF ${FAR_END}`],
    ...NAT,
    ...BLEACH,
  ],
  needs: ["root", "ip", "nft", "sysctl"],
  measure: measureArrival,
  show: showArrival,
});

// ─── drop ────────────────────────────────────────────────────────────────────────────────────────

const DROPPING: readonly Command<"router">[] = [
  ["router", "nft add table ip discard"],
  ["router", "nft 'add chain ip discard f { type filter hook forward priority filter; }'"],
  ["router", "nft add rule ip discard f iifname r0 ip dscp ef counter drop"],
];

/** What the script reports, and how many packets the router dropped. */
export interface Drops {
  readonly runs: readonly Run[];
  readonly dropped: number;
}

/** Makes the same request with DF and EF, and with EF on the SYN too. */
export async function measureDrop(network: Network, stage: Stage = {}): Promise<Drops> {
  const { client, router } = network.at, before = await droppedBy(router), runs: Run[] = [];
  await using _farEnd = await startFarEnd(network);
  for (const options of ["-d DF", "-d EF", "-d EF --mark-syn"]) {
    stage.step?.(`one GET, ${options}`, options === "-d DF" ? 1 : 2);
    runs.push(await runOn(client, options, `${options} -m 1.5`));
  }
  return { runs, dropped: await droppedBy(router) - before };
}

async function droppedBy(router: Namespace): Promise<number> {
  const { stdout } = await router.run("nft", "list", "table", "ip", "discard");
  return Number(/counter packets (\d+)/.exec(stdout)![1]);
}

/** Shows how far each request came. */
export function showDrop({ runs, dropped }: Drops): Shown {
  const sentences = runs.map(({ title, code, json: { milliseconds, sent } }) => {
    const { connect, firstByte } = milliseconds;
    const what = firstByte !== null
      ? "the reply came"
      : connect !== null
      ? `it connected, sent the request ${plural(sent.repeats + 1, "time")}, and got no reply`
      : "it did not connect";
    return `${title}: ${what} (exit ${code}).`;
  });
  sentences.push(
    dropped > 0
      ? `The router dropped ${plural(dropped, "packet")}.`
      : "The router dropped nothing this time.",
  );
  return {
    table: runsText(runs),
    sentences,
    picture: {
      title: "A router that drops EF",
      description: sentences.join(" "),
      topology: DROP.topology,
      panels: panelsOf(runs),
      words: WORDS_DROP,
    },
  };
}

const WORDS_DROP = "DF: Default Forwarding, no mark. EF: Expedited Forwarding, 0xB8.";

/** A provider that drops EF. */
export const DROP = scene({
  name: "drop",
  concept: "A mark can cost the connection: some networks drop what they did not agree to carry. " +
    "An unmarked handshake passes, and then nothing does.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{}, { note: "EF is lost", drop: "left" }],
    "→ the same GET with DF, with EF, and with EF on the SYN too",
  ),
  commands: DROPPING,
  looks: [
    ["router", "nft list table ip discard  # counter is what was dropped"],
    ["client", "tcpdump -ni c0 -v -c 20 tcp port 8086  # sent again and again"],
  ],
  tries: [
    SERVE,
    ["client", `$get -d EF -m 3 ${FAR_END}`],
    ["client", `$get -d DF -m 3 ${FAR_END}`],
    ["client", `$get -d EF,DF -m 3 ${FAR_END}  # both in turn`],
    ["router", "nft flush table ip discard"],
    ["client", `$get -d EF -m 3 ${FAR_END}`],
  ],
  needs: ["root", "ip", "nft", "sysctl"],
  measure: measureDrop,
  show: showDrop,
});
