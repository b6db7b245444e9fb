/**
 * How a run ends: the exit codes, {@linkcode Failure}, and the one place that maps errors of Deno,
 * libc and TLS to a failure.
 *
 * @module
 */

import { netPermission } from "../ffi/deno.ts";
import { BAD_CERTIFICATE, LibcError } from "../ffi/calls.ts";
import type { ConnectOptions } from "../ffi/conn.ts";
import { DescriptorError } from "../ffi/fd.ts";
import { CannotRunError } from "../ffi/libc.ts";
import { MarkError } from "../ffi/mark.ts";
import { formatAddress } from "../ffi/sockaddr.ts";
import { errorText, printable, quote } from "./text.ts";

/** The exit codes; those below 100 are curl's. */
export const Exit = {
  ok: 0,
  usage: 2,
  badUrl: 3,
  hostNotFound: 6,
  cannotConnect: 7,
  badReply: 8,
  endedEarly: 18,
  httpError: 22,
  cannotWrite: 23,
  timeout: 28,
  tlsFailed: 35,
  emptyReply: 52,
  connectionLost: 56,
  badCertificate: 60,
  badCaFile: 77,
  notMarked: 100,
  sentChanged: 101,
  arrivedChanged: 102,
  cannotRun: 103,
  notProved: 104,
} as const;

/** What ends a run. */
export class Failure extends Error {
  /**
   * Describes a failure.
   *
   * @param code the exit code, one of {@linkcode Exit}
   * @param message one line, free of control characters; empty if nobody is left to read it
   * @param hint what to do about it
   */
  constructor(readonly code: number, message: string, readonly hint?: string) {
    super(message);
    this.name = "Failure";
    if (hint === undefined) return;
    // What Deno prints of an error that nobody catches, unless its own stack has been read.
    const frames = new Error().stack!.split("\n").slice(2).join("\n");
    const value = `Failure: ${message}\nhint: ${hint}\n${frames}`;
    Object.defineProperty(this, "stack", { value });
  }
}

/** How far a request has come, which decides what an error means. */
export type Stage = "listening" | "connecting" | "securing" | "connected";

/** Maps any thrown value to a failure. */
export function failureOf(error: unknown, stage: Stage | null = null, to?: Destination): Failure {
  if (error instanceof Failure) return error;
  if (!(error instanceof Error)) return new Failure(Exit.cannotRun, printable(String(error)));
  if (error instanceof CannotRunError) {
    const isPartial = !isGranted({ name: "ffi" });
    const hint = isPartial ? "run with --allow-ffi, not --allow-ffi=FILE" : undefined;
    return new Failure(Exit.cannotRun, error.message, hint);
  }
  if (error instanceof Deno.errors.NotCapable) {
    return missingPermission(to) ?? notCapable(errorText(error));
  }
  if (error instanceof DescriptorError && error.lost) {
    return new Failure(Exit.connectionLost, error.message);
  }
  const markErrors = [LibcError, MarkError, DescriptorError];
  if (stage === "connecting" && markErrors.some((type) => error instanceof type)) {
    return new Failure(Exit.notMarked, `the kernel did not accept the mark: ${error.message}`);
  }
  if (stage === "listening") {
    const message = `cannot listen on ${printable(formatAddress(to!))}: ${errorText(error)}`;
    const isLow = error instanceof Deno.errors.PermissionDenied && to!.port < 1024;
    const hint = "ports below 1024 need root or CAP_NET_BIND_SERVICE: take 8086, or another above";
    return new Failure(Exit.cannotConnect, message, isLow ? hint : undefined);
  }
  if (stage === "connecting") return connectFailure(error, to!);
  if (stage === "securing") return tlsFailure(error);
  if (stage === null) return new Failure(Exit.cannotRun, printable(error.message));
  return new Failure(Exit.connectionLost, `the connection was lost: ${tlsText(error)}`);
}

/** Where a request was to go. */
interface Destination extends Pick<ConnectOptions, "hostname" | "port"> {
  readonly family?: ConnectOptions["family"];
  readonly isHttps?: boolean;
}

/** Whether a host is no name that has to be looked up. */
export function isAddress(host: string): boolean {
  return /^[\d.]+$|:/.test(host);
}

function connectFailure(error: Error, to: Destination): Failure {
  const { hostname, port, family = null, isHttps } = to;
  const where = formatAddress({ hostname, port });
  // A zone that does not exist is 7, as curl has it.
  if ((isUnknownHost(error) && !hostname.includes("%")) || error instanceof URIError) {
    const why = family === null ? "not found" : `has no IPv${family} address`;
    // As with curl, an address of the other family is a host that was found.
    const code = isAddress(hostname) ? Exit.cannotConnect : Exit.hostNotFound;
    return new Failure(code, `host ${quote(hostname)} ${why}`);
  }
  if (error instanceof Deno.errors.TimedOut) {
    return new Failure(Exit.timeout, `no answer from ${where}`);
  }
  const message = `cannot connect to ${where}: ${errorText(error)}`;
  const isHere = /^127\.|^::1$|(^|\.)localhost\.?$/.test(hostname);
  const isRefused = error instanceof Deno.errors.ConnectionRefused;
  if (!isHere || !isRefused || isHttps) return new Failure(Exit.cannotConnect, message);
  const ways = family === 6 || hostname.includes(":")
    ? `--serve '[::1]:${port}', or python3 -m http.server -b ::1 ${port}`
    : `--serve ${port}, or python3 -m http.server ${port}`;
  const hint = `to start a server there: this script with ${ways}`;
  return new Failure(Exit.cannotConnect, message, hint);
}

/** Whether a name has no address. */
export function isUnknownHost(error: unknown): boolean {
  const said = "failed to lookup address information";
  return error instanceof Error && error.message.startsWith(said);
}

/** Words for the certificate errors of Deno's two TLS libraries; a time in them becomes a date. */
const CERTIFICATE_ERRORS: readonly (readonly [said: RegExp, words: string])[] = [
  [/CaUsedAsEndEntity/, "it is a CA certificate, not a server's (self-signed)"],
  [/^self-signed certificate$/, "it is self-signed"],
  [/UnknownIssuer|in certificate chain/, "its issuer is not trusted"],
  [/^unable to verify/, "its issuer is not trusted, or it is not valid today"],
  [/NotValidForName|not valid for name|altnames/, "it is for another host name"],
  [/not valid after (\d+)/, "it was valid until"],
  [/not valid before (\d+)/, "it will be valid from"],
  [/^Expired/, "it has expired"],
  [/^NotValidYet/, "it is not valid yet"],
];

/** Words for what else ends TLS: alerts (RFC 8446 section 6) and errors of Deno's two libraries. */
const TLS_ERRORS: readonly (readonly [said: RegExp, words: string])[] = [
  [/ProtocolVersion/, "the server's version of TLS is not supported"],
  [/HandshakeFailure/, "there is no cipher in common with the server"],
  [/CertificateRequired/, "the server asks for a client's certificate"],
  [/UnrecognisedName/, "the server does not know this host name"],
  [/InvalidContentType/, "it is not TLS"],
  [/^unexpected end|disconnected before/, "the server closed the connection"],
];

/** Words for an error of TLS, with the library's own in brackets. */
function tlsText(error: Error): string {
  const message = errorText(error), known = TLS_ERRORS.find(([said]) => said.test(message));
  return known === undefined ? message : `${known[1]} (${message})`;
}

function tlsFailure(error: Error): Failure {
  const message = errorText(error), isCertificate = message.startsWith(BAD_CERTIFICATE);
  const bare = isCertificate ? message.slice(BAD_CERTIFICATE.length) : message;
  const [said, words] = CERTIFICATE_ERRORS.find(([said]) => said.test(bare)) ?? [/$/, bare];
  const seconds = said.exec(bare)![1];
  const date = seconds && new Date(Number(seconds) * 1000).toISOString().slice(0, 10);
  const why = date === undefined ? words : `${words} ${date}`;
  if (!isCertificate) {
    const isPlain = /InvalidContentType|wrong version number|packet length too long/.test(message);
    const hint = isPlain ? "the server does not speak TLS: is it http://?" : undefined;
    return new Failure(Exit.tlsFailed, `TLS failed: ${tlsText(error)}`, hint);
  }
  const hint = /issuer|signed/.test(words)
    ? "--cacert FILE trusts the certificates in FILE, -k any"
    : "-k accepts any certificate";
  return new Failure(Exit.badCertificate, `the server's certificate is not valid: ${why}`, hint);
}

/** Which permission is missing, if one is; `to` is where that for the network has to lead. */
export function missingPermission(to?: Destination): Failure | null {
  const where = to && formatAddress(to);
  if (where !== undefined && netPermission(where) !== "granted") {
    const hint = `run with --allow-net or --allow-net=${printable(where)}`;
    return new Failure(Exit.cannotRun, `no permission to use ${printable(where)}`, hint);
  }
  if (isGranted({ name: "ffi" })) return null;
  const message = "no permission to call libc, which sets the mark";
  return new Failure(Exit.cannotRun, message, "run with --allow-ffi");
}

/** What Deno or libc's rooms refuse though {@linkcode missingPermission} found nothing. */
function notCapable(message: string): Failure {
  const where = /^requires net access to "(.*?)"/.exec(message)?.[1];
  const flags = where === undefined ? "--allow-net --allow-ffi" : `--allow-net=${where}`;
  return new Failure(Exit.cannotRun, message.split(",")[0], `run with ${flags}`);
}

/** Whether a permission is granted; nobody is asked. */
export function isGranted(permission: Deno.PermissionDescriptor): boolean {
  return Deno.permissions.querySync(permission).state === "granted";
}

/** Whether the other end of a connection has gone: what it has sent can still be read. */
export function isPeerGone(error: unknown): boolean {
  const { BrokenPipe, ConnectionReset, ConnectionAborted } = Deno.errors;
  return [BrokenPipe, ConnectionReset, ConnectionAborted].some((gone) => error instanceof gone);
}

/** What went wrong first: after a write that failed, an empty reply is only a symptom. */
export function rootCause(error: unknown, writeError: unknown): unknown {
  const isReply = error instanceof Failure && error.code !== Exit.emptyReply;
  return isReply ? error : writeError ?? error;
}
