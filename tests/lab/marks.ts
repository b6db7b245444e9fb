/**
 * The scenes about marks on a path: which ones a router changes, and where on a path one is changed.
 *
 * @module
 */

import { describe, hex, markOf, nameOf, parseDscp } from "../../ffi/mod.ts";
import { dscpGet, execute, Nobody, type Outcome } from "../support/processes.ts";
import { FarEnd } from "../support/servers.ts";
import {
  askAll,
  FAR_END,
  type Network,
  scene,
  SERVE,
  type Shown,
  startFarEnd,
  THREE,
  topologyOf,
} from "./scene.ts";
import { type Command, serverOf, type Site, type Wiring } from "./site.ts";
import type { Stage } from "./traffic.ts";

// ─── rewrite ─────────────────────────────────────────────────────────────────────────────────────

/** The code points that the router clears. */
export const CLEARED = ["CS6", "CS7", "AF11", "AF12", "AF13", "7"];

const NUMBERS = CLEARED.map((name) => parseDscp(name).dscp).join(", ");

const CLEARING: readonly Command<"router">[] = [
  ["router", "nft add table ip clear"],
  ["router", "nft 'add chain ip clear f { type filter hook forward priority mangle; }'"],
  [
    "router",
    `nft add rule ip clear f iifname r0 \\\n  ip dscp '{ ${NUMBERS} }' ip dscp set cs0`,
  ],
];

const ALL = Array.from({ length: 64 }, (_, dscp) => ({ mark: markOf(dscp << 2), markSyn: true }));

/** Returns as which code point each of the 64 arrived, if it did. */
export async function measureRewrite(
  network: Network,
  stage: Stage = {},
): Promise<Map<number, number>> {
  await using _server = await startFarEnd(network);
  stage.step?.("a GET with each of 64 code points", 2);
  const answers = await askAll(network, { ways: ALL, ticks: 1, every: 1000, maxTime: 10 });
  const arrived = answers.flatMap(({ way, row: { arrived } }) =>
    [...arrived].map((tos): [number, number] => [way, tos >> 2])
  );
  return new Map(arrived.toSorted(([a], [b]) => a - b));
}

/** Shows which code points the router changed. */
export function showRewrite(arrived: ReadonlyMap<number, number>): Shown {
  const label = (dscp: number) => nameOf(dscp) ?? String(dscp);
  const changed = [...arrived].filter(([sent, got]) => sent !== got);
  const results = [...new Set(changed.map(([, got]) => got))].map((result) => {
    const sent = changed.filter(([, got]) => got === result).map(([sent]) => label(sent));
    return `${sent.join(", ")} as ${label(result)}`;
  });
  const sentences = [
    changed.length === 0
      ? `All ${arrived.size} code points that arrived were unchanged.`
      : `${changed.length} of ${arrived.size} code points arrived changed: ${results.join("; ")}.`,
  ];
  if (arrived.size < 64) sentences.push(`Of ${64 - arrived.size}, the server reported nothing.`);
  const cells = Array.from({ length: 64 }, (_, dscp) => {
    const got = arrived.get(dscp);
    return {
      label: label(dscp),
      became: got === undefined ? "?" : got === dscp ? null : label(got),
    };
  });
  const lines = Array.from(
    { length: 8 },
    (_, line) =>
      cells.slice(line * 8, line * 8 + 8).map(({ label, became }) =>
        (became === null ? label : `${label}→${became}`).padEnd(10)
      ).join("").trimEnd(),
  );
  return {
    table: `The 64 code points; → is what arrived:\n${lines.join("\n")}\n`,
    sentences,
    picture: {
      title: "DSCP on a path: which code points does a router change?",
      description: sentences.join(" "),
      topology: REWRITE.topology,
      panels: [{ kind: "grid", title: "The 64 code points; → is what arrived", cells }],
    },
  };
}

/** A router that clears some marks. */
export const REWRITE = scene({
  name: "rewrite",
  concept: "A DSCP is a request to every router on the path: each of them may clear it or set " +
    "another one.",
  wiring: THREE,
  topology: topologyOf(
    THREE,
    [{ label: "any mark" }, { label: "some cleared" }],
    "→ 64 GETs; the server reports the mark of each SYN",
  ),
  commands: CLEARING,
  looks: [
    ["router", "nft list table ip clear"],
    ["client", "tcpdump -ni c0 -v -c 20 tcp port 8086  # before the router"],
    ["server", "tcpdump -ni s0 -v -c 20 tcp port 8086  # behind it"],
  ],
  tries: [
    SERVE,
    ["client", `$get -d EF --mark-syn ${FAR_END}`],
    ["client", `$get -d CS6 --mark-syn ${FAR_END}`],
    ["router", "nft add rule ip clear f ip dscp ef ip dscp set cs1"],
    ["client", `$get -d EF --mark-syn ${FAR_END}`],
  ],
  needs: ["root", "ip", "nft", "sysctl"],
  measure: measureRewrite,
  show: showRewrite,
});

// ─── path ────────────────────────────────────────────────────────────────────────────────────────

/** Two routers between two others. */
const FOUR: Wiring<"client" | "r1" | "r2" | "server"> = {
  hosts: ["client", "r1", "r2", "server"],
  links: [
    { left: "c0", right: "r1a", ipv4: "10.78.1", ipv6: "2001:db8:1" },
    { left: "r1b", right: "r2a", ipv4: "10.78.2", ipv6: "2001:db8:2" },
    { left: "r2b", right: "s0", ipv4: "10.78.3", ipv6: "2001:db8:3" },
  ],
};

// A router quotes once a second unless told otherwise.
const NO_LIMIT = "sysctl -q -w net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0";

const CHANGING: readonly Command<"r1" | "r2">[] = [
  ["r1", NO_LIMIT],
  ["r2", NO_LIMIT],
  ["r1", "nft add table inet change"],
  ["r1", "nft 'add chain inet change f { type filter hook forward priority mangle; }'"],
  ["r1", "nft add rule inet change f ip dscp ef ip dscp set cs1"],
  ["r1", "nft add rule inet change f ip6 dscp ef ip6 dscp set cs1"],
];

/** What `--trace` printed, and what its JSON says. */
export interface Trace {
  readonly runs: readonly { readonly title: string; readonly text: string }[];
  readonly path: readonly { readonly hop: number; readonly tos: number | null }[];
  readonly changed: null | {
    readonly after: number;
    readonly at: number;
    readonly from: number;
    readonly to: number;
  };
}

const { ipv4, ipv6 } = serverOf(FOUR);
const URLS = { ipv4: `http://${ipv4}:8086/`, ipv6: `http://[${ipv6}]:8087/` };

/** Traces a path on which the first router changes EF to CS1. */
export async function measurePath(
  site: Site<"client" | "r1" | "r2" | "server">,
  stage: Stage = {},
): Promise<Trace> {
  const { client, server } = site.at;
  await using _ipv4 = await FarEnd.start("0.0.0.0:8086", server.under);
  await using _ipv6 = await FarEnd.start("[::]:8087", server.under);
  const { ipv4, ipv6 } = URLS;
  const options = ["--trace", "--mark-syn"];
  stage.step?.("--trace through two routers", 3);
  const { stdout } = await dscpGet([...options, "--json", ipv4], client);
  const asRoot = await dscpGet([...options, ipv4], client);
  stage.step?.("the same without privilege", 5);
  await using nobody = await Nobody.create();
  const asNobody = (url: string) => execute([...client.under, ...nobody.command, ...options, url]);
  const run = (title: string, { stdout, stderr, code }: Outcome) => ({
    title,
    text: stdout.trimEnd() === "" ? `exit ${code}: ${stderr.trimEnd()}` : stdout.trimEnd(),
  });
  const runs = [
    run("IPv4, as root", asRoot),
    run("IPv4, as nobody", await asNobody(ipv4)),
    run("IPv6, as nobody", await asNobody(ipv6)),
  ];
  const json = stdout.split("\n").find((line) => line.includes('"path"'));
  const { path = [], changed = null } = json === undefined ? {} : JSON.parse(json);
  return { runs, path, changed };
}

/** Shows where the mark was changed. */
export function showPath({ runs, path, changed }: Trace): Shown {
  const { hosts } = PATH.topology;
  const mark = (tos: number | null) => tos === null ? "unknown" : describe(markOf(tos));
  const known = path.filter(({ tos }) => tos !== null).length;
  const sentences = [
    changed !== null
      ? `${mark(changed.from)} was changed to ${mark(changed.to)} between ` +
        `${hosts[changed.after].name} and ${hosts[changed.at].name}.`
      : known === 0
      ? "No hop reported the mark that it received: nothing is known of the path."
      : `No change was seen on the ${known} of ${path.length} hops that are known.`,
  ];
  const received = hosts.map(({ name }, hop) => ({
    name,
    note: hop === 0 ? `sends ${hex(0xb8)}` : mark(path.find((one) => one.hop === hop)?.tos ?? null),
  }));
  return {
    table: runs.map(({ title, text }) => `${title}:\n${text}\n`).join("\n"),
    sentences,
    picture: {
      title: "Where is the mark changed? --trace, hop by hop",
      description: sentences.join(" "),
      topology: { ...PATH.topology, hosts: received },
      panels: runs.map(({ title, text }) => ({
        kind: "lines",
        title: `What --trace prints, ${title}`,
        lines: text.split("\n"),
      })),
    },
  };
}

/** Where on a path a mark is changed. */
export const PATH = scene({
  name: "path",
  concept: "Where a mark is changed: a router that drops a probe whose time to live has ended " +
    "quotes the header that it received.",
  wiring: FOUR,
  topology: topologyOf(
    FOUR,
    [],
    "→ probes with EF that end at hop 1, 2 and 3; r1 sets CS1",
  ),
  commands: CHANGING,
  looks: [
    ["client", "tcpdump -ni c0 -v -c 20 tcp or icmp  # probes, and who quotes them"],
    ["r2", "tcpdump -ni r2a -v -c 20 tcp  # behind the change"],
  ],
  tries: [
    SERVE,
    ["client", `$get --trace --mark-syn ${URLS.ipv4}`],
    ["r1", "nft flush table inet change"],
    ["client", `$get --trace --mark-syn ${URLS.ipv4}`],
  ],
  needs: ["root", "ip", "nft", "sysctl", "setpriv"],
  measure: measurePath,
  show: showPath,
});
