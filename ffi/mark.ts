/**
 * Sets the ToS byte or Traffic Class of a connection, and reads it back.
 *
 * @module
 */

import { checkTos, hex } from "./dscp.ts";
import { type Connection, type Listening, socketOf } from "./fd.ts";
import * as libc from "./libc.ts";
import { getOption, setOption } from "./calls.ts";
import { AF_INET, AF_INET6, encode } from "./sockaddr.ts";

/** The kernel accepted the call, but not the mark: another byte reads back. */
export class MarkError extends Error {
  /**
   * The error of one option.
   *
   * @param option the option's name, such as `IP_TOS`
   * @param set the byte that was set
   * @param readBack the byte that was read back
   */
  constructor(option: string, readonly set: number, readonly readBack: number) {
    super(
      `setsockopt(${option}, ${hex(set)}) was accepted, ` +
        `but getsockopt(${option}) reads back ${hex(readBack)} (errno 0)`,
    );
    this.name = "MarkError";
  }
}

/** A listener has the mark, but what it accepts has that of each client: `tcp_reflect_tos` is 1. */
export class ReflectedTosError extends Error {
  /** `ReflectedTosError`. */
  override name = "ReflectedTosError";
}

/**
 * Sets the byte that the connection's packets carry from now on: `IP_TOS` on an IPv4 socket; on an
 * IPv6 one `IPV6_TCLASS` for IPv6 peers and `IP_TOS` for IPv4-mapped ones. Then reads it back: the
 * kernel accepted it, but see {@linkcode drainSent} for what left. The sockets that a listener
 * accepts inherit its byte, unless sysctl `net.ipv4.tcp_reflect_tos` is 1: then each has that of
 * its client's SYN. A connection to a listener of its own on 127.0.0.1 shows that, and this throws;
 * the accepted connections have to be marked, as `setTos` of {@linkcode arrivedFrom} does.
 *
 * ```ts
 * import { setTos } from "./mod.ts";
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const conn = await Deno.connect({ port: (listener.addr as Deno.NetAddr).port });
 * console.log(setTos(conn, 0xB8)); // 184
 * conn.close();
 * listener.close();
 * ```
 *
 * @param tos 0 to 252, ECN bits zero
 * @returns the byte read back, equal to `tos`
 * @throws {RangeError} not such a byte
 * @throws {LibcError} the kernel refuses; names the call and errno
 * @throws {MarkError} the kernel reads back another byte
 * @throws {ReflectedTosError} of a listener; found out by a connection to one of its own on
 * 127.0.0.1
 * @throws {DescriptorError} the connection is closed
 */
export function setTos(socket: Connection | Listening, tos: number): number {
  const { fd, family } = socketOf(socket), readBack = setTosAt(fd, family, tos);
  if ("addr" in socket && reflectsTos()) {
    const why = "sysctl net.ipv4.tcp_reflect_tos is 1";
    throw new ReflectedTosError(
      `connections have the byte of their SYN, not the listener's: ${why}`,
    );
  }
  return readBack;
}

/** Whether accepted connections have the byte of the SYN, and not the listener's. */
function reflectsTos(): boolean {
  const address = encode({ transport: "tcp", hostname: "127.0.0.1", port: 0 });
  const [listener, client] = [libc.socket(AF_INET), libc.socket(AF_INET)];
  let accepted = -1;
  try {
    setTosAt(listener, AF_INET, 4);
    libc.bind(listener, address);
    libc.listen(listener);
    libc.getsockname(listener, address);
    libc.connect(client, address);
    // The handshake on loopback is over when connect(2) returns; if not, this remains unknown.
    accepted = libc.accept(listener);
    return accepted >= 0 && getOption(accepted, libc.IP_TOS) !== 4;
  } finally {
    for (const fd of [listener, client, accepted]) libc.close(fd);
  }
}

/** {@linkcode setTos} of a descriptor that the caller owns, of this address family. */
export function setTosAt(fd: number, family: number, tos: number): number {
  checkTos(tos);
  for (const option of optionsOf(family)) {
    setOption(fd, option, tos);
    const readBack = getOption(fd, option);
    if (readBack !== tos) throw new MarkError(option.name, tos, readBack);
  }
  return tos;
}

/**
 * The byte that the connection's packets carry, as the kernel keeps it: 0 to 255.
 *
 * @throws {DescriptorError} the connection is closed
 */
export function getTos(socket: Connection | Listening): number {
  const { fd, family } = socketOf(socket);
  return getOption(fd, optionsOf(family)[0]);
}

// An AF_INET6 socket with an IPv4-mapped peer sends IPv4 packets and obeys IP_TOS alone: set both.
function optionsOf(family: number): readonly libc.SocketOption[] {
  return family === AF_INET6 ? [libc.IPV6_TCLASS, libc.IP_TOS] : [libc.IP_TOS];
}
