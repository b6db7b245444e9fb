/**
 * What a run says of each thing that a path can do to a mark on its way to `--serve` and back; the
 * witness is tcpdump at the server's door.
 */

import assert from "node:assert/strict";
import { Chain, type Namespace } from "./support/namespaces.ts";
import { Capture, type Seen } from "./support/packets.ts";
import { Background, dscpGet, execute, Nobody, testWith } from "./support/processes.ts";
import { FarEnd } from "./support/servers.ts";

const NEEDS = ["root", "ip", "nft", "tcpdump", "socat", "setpriv"];

/** A chain and a rule of nft, for packets that a router forwards. */
function forward(host: Namespace, ...rules: string[]): Promise<unknown> {
  const chain = "add chain inet t f { type filter hook forward priority mangle; }";
  return nft(host, "add table inet t", chain, ...rules.map((rule) => `add rule inet t f ${rule}`));
}

function nft(host: Namespace, ...commands: string[]): Promise<unknown> {
  return host.run("nft", commands.join("; "));
}

const SYN = "tcp flags & (syn|ack) == syn", DATA = "tcp flags & psh == psh";

interface Row {
  readonly what: string;
  /** Prepares the routers; the first is a NAT's place, the second that of a rewriting rule. */
  readonly path?: (routers: readonly Namespace[], ip: string) => Promise<unknown>;
  readonly args?: readonly string[];
  /** The port to ask, and of whom, if not of the server. */
  readonly at?: (chain: Chain, isIPv6: boolean) => string;
  readonly code: number;
  readonly says: readonly RegExp[];
  /** What tcpdump sees of SYN and request at the server; `null` if nothing comes. */
  readonly wire: readonly [syn: number, data: number | null] | null;
  readonly isNobody?: boolean;
}

const toEF = (what: string) => (routers: readonly Namespace[], ip: string) =>
  forward(routers[1], `tcp dport 8086 ${what.replaceAll("IP", ip)}`);
const back = (routers: readonly Namespace[], ip: string) =>
  forward(routers[1], `tcp sport 8086 ${ip} dscp set cs0`);
const masquerade = (routers: readonly Namespace[]) =>
  nft(
    routers[0],
    "add table inet n",
    "add chain inet n p { type nat hook postrouting priority srcnat; }",
    "add rule inet n p oifname far masquerade",
  );
const rowsFor = (isIPv6: boolean): Row[] => [
  {
    what: "clean",
    code: 0,
    says: [/^arrived +request 0xB8: the mark survived; SYN 0x00/m],
    wire: [0, 0xb8],
  },
  {
    what: "clean, as nobody",
    isNobody: true,
    code: 0,
    says: [/: the mark survived; SYN 0x00/],
    wire: [0, 0xb8],
  },
  {
    what: "clean, proof required",
    args: ["--require-proof"],
    code: 0,
    says: [/the mark survived/],
    wire: [0, 0xb8],
  },
  {
    what: "clean, SYN marked",
    args: ["--mark-syn", "--require-proof"],
    code: 0,
    says: [/^arrived +request 0xB8, SYN 0xB8: the mark survived$/m],
    wire: [0xb8, 0xb8],
  },
  {
    what: "SYN bleached, which was unmarked",
    path: toEF(`${SYN} IP dscp set cs0`),
    code: 0,
    says: [/the mark survived/],
    wire: [0, 0xb8],
  },
  {
    what: "SYN bleached",
    path: toEF(`${SYN} IP dscp set cs0`),
    args: ["--mark-syn"],
    code: 102,
    says: [/^arrived +request 0xB8, SYN 0x00: NOT/m, /the request kept its mark: a SYN proxy/],
    wire: [0, 0xb8],
  },
  {
    what: "data bleached",
    path: toEF(`${DATA} IP dscp set cs0`),
    code: 102,
    says: [
      /^arrived +request 0x00: NOT the mark that was sent; SYN 0x00/m,
      /the path rewrote it, as by Bleach-DSCP/,
      /--mark-syn/,
    ],
    wire: [0, 0],
  },
  {
    what: "data bleached, SYN marked",
    path: toEF(`${DATA} IP dscp set cs0`),
    args: ["--mark-syn"],
    code: 102,
    says: [/^arrived +request 0x00, SYN 0xB8: NOT/m],
    wire: [0xb8, 0],
  },
  {
    what: "remapped",
    path: toEF("IP dscp ef IP dscp set af41"),
    code: 102,
    says: [/sent EF \(0xB8\), arrived AF41 \(0x88\): the path rewrote it/],
    wire: [0, 0x88],
  },
  {
    what: "remapped, as expected",
    path: toEF("IP dscp ef IP dscp set af41"),
    args: ["--expect", "AF41"],
    code: 0,
    says: [/^arrived +request 0x88: as expected/m],
    wire: [0, 0x88],
  },
  {
    what: "remapped, not as expected",
    path: toEF("IP dscp ef IP dscp set cs1"),
    args: ["--expect", "AF41"],
    code: 102,
    says: [/arrived CS1 \(0x20\), expected AF41 \(0x88\)/],
    wire: [0, 0x20],
  },
  {
    what: "marked by a router's rule, as expected",
    path: toEF("IP dscp set ef"),
    args: ["-d", "DF", "--expect", "EF"],
    code: 0,
    says: [/^arrived +request 0xB8, SYN 0xB8: as expected/m],
    wire: [0xb8, 0xb8],
  },
  {
    what: "marked by no rule, though expected",
    args: ["-d", "DF", "--expect", "EF"],
    code: 102,
    says: [/NOT the mark that is expected/],
    wire: [0, 0],
  },
  {
    what: "dropped",
    path: toEF("IP dscp ef drop"),
    args: ["-m", "3"],
    code: 28,
    says: [
      /the unmarked handshake passed, but the request with EF \(0xB8\) got no answer/,
      /-d EF,DF/,
      /sent again/,
    ],
    wire: [0, null],
  },
  {
    what: "dropped, SYN marked",
    path: toEF("IP dscp ef drop"),
    args: ["--mark-syn", "--connect-timeout", "1"],
    code: 28,
    says: [/took longer than 1 second/],
    wire: null,
  },
  {
    what: "NAT in front",
    path: masquerade,
    args: ["--require-proof"],
    code: 0,
    says: [/the mark survived/, /^ +through NAT: the server sees \S+:\d+$/m],
    wire: [0, 0xb8],
  },
  {
    what: "NAT in front, as nobody, and data bleached behind it",
    isNobody: true,
    path: async (routers, ip) => {
      await masquerade(routers);
      await toEF(`${DATA} IP dscp set cs0`)(routers, ip);
    },
    code: 102,
    says: [/NOT the mark that was sent/, /through NAT/, /the path rewrote it/],
    wire: [0, 0],
  },
  {
    what: "the server behind NAT",
    path: (routers, ip) =>
      nft(
        routers[1],
        `add table ${ip} n`,
        `add chain ${ip} n p { type nat hook prerouting priority dstnat; }`,
        `add rule ${ip} n p tcp dport 9000 dnat to ${
          isIPv6 ? "[2001:db8:3::2]" : "10.78.3.2"
        }:8086`,
      ),
    at: (_, isIPv6) => isIPv6 ? "[2001:db8:2::2]:9000" : "10.78.2.2:9000",
    args: ["--require-proof"],
    code: 0,
    says: [/the mark survived/],
    wire: [0, 0xb8],
  },
  {
    what: "a proxy in front",
    at: (_, isIPv6) => isIPv6 ? "[2001:db8:2::2]:9001" : "10.78.2.2:9001",
    code: 0,
    says: [/on another connection: a\s+proxy/],
    wire: [0, 0],
  },
  {
    what: "a proxy in front, proof required",
    at: (_, isIPv6) => isIPv6 ? "[2001:db8:2::2]:9001" : "10.78.2.2:9001",
    args: ["--require-proof"],
    code: 104,
    says: [/a proxy is in between/],
    wire: [0, 0],
  },
  {
    what: "the way back bleached",
    path: back,
    code: 102,
    says: [
      /sent with 0xB8,\s+came\s+back\s+with\s+0x00:\s+NOT/,
      /the reply was sent EF \(0xB8\), came back DF/,
    ],
    wire: [0, 0xb8],
  },
  {
    what: "the way back bleached, as nobody",
    isNobody: true,
    path: back,
    code: isIPv6 ? 102 : 0,
    says: isIPv6
      ? [/came\s+back\s+with\s+0x00:\s+NOT/]
      : [/^reply +200 OK, .*sent with 0xB8\s+\(only\s+root\s+sees\s+what\s+came\s+back\)$/m],
    wire: [0, 0xb8],
  },
];

for (const isIPv6 of [false, true]) {
  const family = isIPv6 ? "ipv6" : "ipv4", ip = isIPv6 ? "ip6" : "ip";
  testWith(
    NEEDS,
    `${family}: what a path does to a mark is told, and what tcpdump sees agrees`,
    async () => {
      await using chain = await Chain.create(2);
      await using nobody = await Nobody.create();
      const { client, routers, server } = chain, address = chain.serverAddress[family];
      const host = isIPv6 ? `[${address}]` : address;
      await using _server = await FarEnd.start("[::]:8086", server.under);
      const listen = `${isIPv6 ? "TCP6" : "TCP4"}-LISTEN:9001,fork,reuseaddr`;
      const words = ["socat", "-d", "-d", listen, `${isIPv6 ? "TCP6" : "TCP4"}:${host}:8086`];
      await using proxy = new Background([...routers[1].under, ...words]);
      await proxy.until((said) => said.includes("listening on"));
      for (const { what, path, args = [], at, code, says, wire, isNobody } of rowsFor(isIPv6)) {
        for (const router of routers) await router.run("nft", "flush", "ruleset");
        await path?.(routers, ip);
        await using capture = await Capture.start(8086, "near", server.under);
        const url = `http://${at?.(chain, isIPv6) ?? `${host}:8086`}/`;
        const run = isNobody
          ? await execute([...client.under, ...nobody.command, ...args, url])
          : await dscpGet([...args, url], client);
        assert.equal(run.code, code, `${what}: ${run.stderr}`);
        for (const words of says) assert.match(run.stderr, words, what);
        if (wire === null) continue;
        const [syn, data] = wire;
        // What an earlier row left behind may be sent again.
        const ofRun = (packets: Seen[]) => {
          const first = packets.find(({ to, flags }) => to === 8086 && flags === "S");
          return packets.filter(({ from, to }) => to === 8086 && from === first?.from);
        };
        const isSeen = (packets: Seen[]) =>
          ofRun(packets).some(({ length }) => data === null || length > 0);
        const seen = ofRun(await capture.until(isSeen));
        assert.equal(seen.find(({ flags }) => flags === "S")!.tos, syn, `${what}: SYN`);
        const request = seen.find(({ length }) => length > 0);
        assert.equal(request?.tos ?? null, data, `${what}: request`);
      }
    },
  );
}
