/**
 * The lab's scene about paths: four hosts and more in a row, of which the first router rewrites EF.
 *
 * @module
 */

import { Chain, CHAIN_SERVER } from "./namespaces.ts";
import { command, execute, Nobody } from "./processes.ts";
import { FarEnd } from "./servers.ts";

/** One run of the script in the scene. */
export interface Traced {
  /** The command, as a person would type it. */
  readonly title: string;
  /** What it prints on standard output. */
  readonly stdout: string;
  /** The exit code. */
  readonly code: number;
}

/**
 * Builds client – r1 – r2 – r3 – server, rewrites EF to CS1 in r1, silences r3, and traces the path
 * as root and as nobody.
 */
export async function* pathScene(): AsyncGenerator<Traced> {
  await using chain = await Chain.create();
  const [r1, , r3] = chain.routers;
  await r1.script(
    "nft add table inet q",
    "nft 'add chain inet q f { type filter hook forward priority mangle; }'",
    "nft add rule inet q f ip dscp ef ip dscp set cs1",
    "nft add rule inet q f ip6 dscp ef ip6 dscp set cs1",
  );
  await r3.script(
    "nft add table inet q",
    "nft 'add chain inet q o { type filter hook output priority 0; }'",
    "nft add rule inet q o icmp type time-exceeded drop",
  );
  await using _server = await FarEnd.start("[::]:8086", chain.server.under);
  await using nobody = await Nobody.create();
  const ipv4 = `http://${CHAIN_SERVER.ipv4}:8086/`, ipv6 = `http://[${CHAIN_SERVER.ipv6}]:8086/`;
  for (
    const [user, words, args] of [
      ["root", command([]), [ipv4]],
      ["root", command([]), ["-d", "EF,AF41,DF", ipv4]],
      ["nobody", nobody.command, [ipv6]],
      ["nobody", nobody.command, [ipv4]],
    ] as const
  ) {
    const run = [...chain.client.under, ...words, "--silent", "--trace", ...args];
    const { stdout, code } = await execute(run);
    yield { title: `${user}: main.ts --trace ${args.join(" ")}`, stdout, code };
  }
}
