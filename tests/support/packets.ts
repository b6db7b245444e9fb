/**
 * Packets on the wire: tcpdump as the independent witness, and packets written as hex.
 *
 * @module
 */

import { Background } from "./processes.ts";

/** A packet as tcpdump saw it. */
export interface Seen {
  /** The ToS byte, or the Traffic Class. */
  tos: number;
  /** Source port. */
  from: number;
  /** Destination port. */
  to: number;
  /** As tcpdump writes them: `S`, `S.`, `.`, `P.`, `F.`, `R`. */
  flags: string;
  /** Bytes of TCP payload. */
  length: number;
}

/** A running tcpdump for one port. */
export class Capture implements AsyncDisposable {
  #tcpdump: Background;

  private constructor(tcpdump: Background) {
    this.#tcpdump = tcpdump;
  }

  /** Starts tcpdump and waits until it captures. */
  static async start(port: number, device = "lo", under: readonly string[] = []): Promise<Capture> {
    // Headers only: with whole packets the kernel's buffer holds few, and under load it drops some.
    const words = `tcpdump -i ${device} -s 256 -n -v -l -U --immediate-mode`.split(" ");
    const tcpdump = new Background([...under, ...words, `tcp port ${port}`]);
    await tcpdump.until((said) => said.includes("listening on"));
    return new Capture(tcpdump);
  }

  /** The packets so far. */
  get packets(): Seen[] {
    const pattern =
      /^(?:\S+ )?IP6? \((?:tos (0x[0-9a-f]+)|class (0x[0-9a-f]+)|)[^\n]*?\)(?:\n +| )\S+\.(\d+) > \S+\.(\d+): Flags \[([^\]]+)\].*length (\d+)/gm;
    return [...this.#tcpdump.said.matchAll(pattern)].map((
      [, tos, trafficClass, from, to, flags, length],
    ) => ({
      tos: Number(tos ?? trafficClass ?? 0),
      from: Number(from),
      to: Number(to),
      flags,
      length: Number(length),
    }));
  }

  /** Waits until `passes` accepts the packets so far. */
  async until(passes: (packets: Seen[]) => boolean): Promise<Seen[]> {
    await this.#tcpdump.until(() => passes(this.packets));
    return this.packets;
  }

  /** Waits for the end of a connection: both FINs and the ACK of the second, or a reset. */
  async connection(): Promise<Seen[]> {
    return await this.until((packets) => {
      const fins = packets.flatMap(({ flags }, at) => flags.includes("F") ? [at] : []);
      return packets.some(({ flags }) => flags.includes("R")) ||
        (fins.length >= 2 &&
          packets.slice(fins[1] + 1).some(({ from }) => from !== packets[fins[1]].from));
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#tcpdump[Symbol.asyncDispose]();
  }
}

/** Returns the bytes of hex digits; spaces between them are ignored. */
export function fromHex(digits: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.fromHex(digits.replaceAll(" ", ""));
}
