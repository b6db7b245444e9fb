/**
 * Where a scene takes place: hosts in a row, each in a network namespace, with a link between every
 * two neighbours. This is the one place that runs the commands that build a network, and it records
 * each as it was run: what the lab prints for a person to type is that record.
 *
 * @module
 */

import { Namespace } from "../support/namespaces.ts";
import { succeed } from "../support/processes.ts";
import { until } from "../support/waiting.ts";

/** A shell command, and the host on which it runs. */
export type Command<Host extends string = string> = readonly [host: Host, line: string];

/** Hosts in a row, and the links between neighbours. */
export interface Wiring<Host extends string = string> {
  readonly hosts: readonly Host[];
  /** Link n is between host n and host n + 1. */
  readonly links: readonly Wire[];
}

/** A link: a device at either end, and a network of which the left end has address 1, the right 2. */
export interface Wire {
  readonly left: string;
  readonly right: string;
  /** The first three bytes of an IPv4 network, such as `192.0.2`. */
  readonly ipv4: string;
  /** The first groups of an IPv6 network of 64 bits, such as `2001:db8:1`; without, none. */
  readonly ipv6?: string;
}

/** The addresses of the last host, at which servers listen. */
export function serverOf({ links }: Wiring): { ipv4: string; ipv6: string } {
  const { ipv4, ipv6 } = links.at(-1)!;
  return { ipv4: `${ipv4}.2`, ipv6: `${ipv6}::2` };
}

/** The commands, behind `ip netns add`, that connect hosts: links, addresses, routes. */
function wire({ hosts, links }: Wiring, nameOf: (host: string) => string): Command[] {
  const last = hosts.length - 1;
  const veths = links.map(({ left, right }, at): Command => [
    hosts[at],
    `ip link add ${left} type veth peer name ${right} netns ${nameOf(hosts[at + 1])}`,
  ]);
  const ends = links.flatMap(({ left, right, ipv4, ipv6 }, at) =>
    ([[hosts[at], left, 1], [hosts[at + 1], right, 2]] as const).flatMap(
      ([host, device, end]): Command[] => [
        [host, `ip addr add ${ipv4}.${end}/24 dev ${device}`],
        ...ipv6 === undefined ? [] : [
          // Duplicate address detection would keep it unusable for a second.
          [host, `ip addr add ${ipv6}::${end}/64 dev ${device} nodad`] as const,
        ],
        [host, `ip link set ${device} up`],
      ],
    )
  );
  const routes = hosts.flatMap((host, at): Command[] => {
    const [left, right] = [links[at - 1], links[at]];
    const via = (to: string, link: Wire, end: number): Command[] => [
      [host, `ip route add ${to} via ${link.ipv4}.${end}`],
      ...link.ipv6 === undefined ? [] : [
        [host, `ip -6 route add ${to} via ${link.ipv6}::${end}`] as const,
      ],
    ];
    if (at === last) return via("default", left, 1);
    const isRouter = at > 0, ipv6 = isRouter && right.ipv6 !== undefined;
    return [
      ...isRouter ? [[host, "sysctl -q -w net.ipv4.ip_forward=1"] as const] : [],
      ...ipv6 ? [[host, "sysctl -q -w net.ipv6.conf.all.forwarding=1"] as const] : [],
      ...at === 0 || at < last - 1 ? via("default", right, 2) : [],
      ...links.slice(0, Math.max(0, at - 1)).flatMap((far) => [
        [host, `ip route add ${far.ipv4}.0/24 via ${left.ipv4}.1`] as const,
        ...far.ipv6 === undefined ? [] : [
          [host, `ip -6 route add ${far.ipv6}::/64 via ${left.ipv6}::1`] as const,
        ],
      ]),
    ];
  });
  const loopbacks = hosts.map((host): Command => [host, "ip link set lo up"]);
  return [...loopbacks, ...veths, ...ends, ...routes];
}

/** Writes a command so that a shell outside runs it in a namespace, in lines of 80 columns. */
export function inNamespace(name: string, line: string): string {
  const [, program, rest] = /^(ip|tc) ([^]*)$/.exec(line) ?? [];
  if (program !== undefined) return `${program} -n ${name} ${rest}`;
  const prefix = `ip netns exec ${name}`, first = line.split("\n", 1)[0];
  return `${prefix}${prefix.length + first.length < 80 ? " " : " \\\n  "}${line}`;
}

/** The namespaces of these names that are there. */
export async function presentOf(names: Iterable<string>): Promise<Namespace[]> {
  const { stdout } = await succeed("ip", "netns", "list");
  const present = new Set(stdout.split("\n").map((line) => line.split(" ")[0]));
  return [...new Set(names)].filter((name) => present.has(name)).map(Namespace.existing);
}

let temporary = 0;

/** Hosts in namespaces, deleted when disposed of. */
export class Site<Host extends string = string> implements AsyncDisposable {
  /** Every command that was run, in order, as a shell takes it. */
  readonly log: string[] = [];
  readonly at: Readonly<Record<Host, Namespace>>;

  private constructor(
    readonly wiring: Wiring<Host>,
    readonly nameOf: (host: string) => string,
  ) {
    const entries = wiring.hosts.map((host) => [host, Namespace.existing(nameOf(host))]);
    this.at = Object.fromEntries(entries);
  }

  /**
   * Builds a network, and runs further commands on its hosts. No namespace of it may be there.
   *
   * @param prefix of the names of namespaces, `PREFIX-HOST`; without, they are this process's own
   */
  static async build<Host extends string>(
    wiring: Wiring<Host>,
    commands: readonly Command<Host>[],
    prefix: string | null = null,
  ): Promise<Site<Host>> {
    const first = temporary;
    if (prefix === null) temporary += wiring.hosts.length;
    const nameOf = (host: string) =>
      prefix === null
        ? `dscp-get-${Deno.pid}-${1000 + first + wiring.hosts.indexOf(host as Host)}`
        : `${prefix}-${host}`;
    const site = new Site(wiring, nameOf);
    try {
      for (const host of wiring.hosts) await site.#run(`ip netns add ${nameOf(host)}`);
      await site.apply(wire(wiring, nameOf) as Command<Host>[]);
      await site.apply(commands);
      await site.#ready();
      return site;
    } catch (error) {
      await site[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** A network that stands already. */
  static async standing<Host extends string>(
    wiring: Wiring<Host>,
    prefix: string,
  ): Promise<Site<Host>> {
    const site = new Site(wiring, (host) => `${prefix}-${host}`);
    await site.#ready();
    return site;
  }

  /** Waits for IPv6: the kernel may take a second to see that a link is up. */
  async #ready(): Promise<void> {
    const { hosts, links } = this.wiring;
    for (const [at, { left, right, ipv6 }] of links.entries()) {
      if (ipv6 === undefined) continue;
      for (const [host, device] of [[hosts[at], left], [hosts[at + 1], right]]) {
        const shown = `ip -n ${this.nameOf(host)} -6 -o addr show dev ${device} scope link`;
        const isUp = async () => (await succeed(...shown.split(" "))).stdout.includes("fe80");
        await until(isUp, `an address of ${device}`);
      }
    }
  }

  async #run(line: string): Promise<void> {
    this.log.push(line);
    await succeed("sh", "-c", line);
  }

  /** Runs commands on their hosts, until one fails. @throws if one does */
  async apply(commands: readonly Command<Host>[]): Promise<void> {
    for (const [host, line] of commands) await this.#run(inNamespace(this.nameOf(host), line));
  }

  /** All namespaces. */
  get hosts(): Namespace[] {
    return this.wiring.hosts.map((host) => this.at[host]);
  }

  /** Ends the processes in those that are there, and deletes them. */
  async [Symbol.asyncDispose](): Promise<void> {
    const present = await presentOf(this.hosts.map(({ name }) => name));
    for (const host of present) await host[Symbol.asyncDispose]();
  }
}
