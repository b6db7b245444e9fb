/**
 * Waits for any number of sockets in one thread, epoll(7).
 *
 * Deno runs calls that wait in a pool of 32 threads, which file reads and name look-ups share: one
 * waiting thread for each socket would fill it.
 *
 * @module
 */

import { orDenoError } from "./calls.ts";
import * as libc from "./libc.ts";

const EPOLL_CTL_ADD = 1, EPOLL_CTL_DEL = 2;
// Edge-triggered: a copy of a sent packet on the error queue would otherwise report for ever.
const EPOLLIN = 0x1, EPOLLOUT = 0x4, EPOLLET = 0x80000000;
// struct epoll_event { uint32_t events; uint64_t data; }, packed on x86_64 only
const [EVENT_SIZE, DATA_AT] = Deno.build.arch === "x86_64" ? [12, 4] : [16, 8];
const MOST_EVENTS = 64;

/** The epoll instance, and the eventfd that ends its wait; opened at the first use. */
let epoll = -1, waker = -1, isRunning = false;
const waiting = new Map<number, PromiseWithResolvers<void>>();
// Global, so that it stays referenced while the other thread writes to it.
const events = new Uint8Array(EVENT_SIZE * MOST_EVENTS);

/** Begins to watch a descriptor. @throws {Error} the kernel refuses, or no descriptor is free */
export function watch(fd: number): void {
  if (epoll < 0) {
    waker = orDenoError(libc.eventfd());
    epoll = libc.epoll_create1();
    if (epoll < 0) libc.close(waker);
    orDenoError(epoll);
    watch(waker);
  }
  const event = new Uint8Array(EVENT_SIZE), view = new DataView(event.buffer);
  view.setUint32(0, EPOLLIN | EPOLLOUT | EPOLLET, true);
  view.setInt32(DATA_AT, fd, true);
  orDenoError(libc.epoll_ctl(epoll, EPOLL_CTL_ADD, fd, event));
}

/** Ends it, before the descriptor is closed or handed on; a wait for it ends as well. */
export function unwatch(fd: number): void {
  libc.epoll_ctl(epoll, EPOLL_CTL_DEL, fd, new Uint8Array(EVENT_SIZE));
  wake(fd);
  // Wake the thread when nothing is waited for; it would keep the process alive.
  if (waiting.size === 0) libc.eventfd_write(waker);
}

/** Waits for the next event of a descriptor: try the call first, and again after this. */
export function nextEvent(fd: number): Promise<void> {
  let entry = waiting.get(fd);
  if (entry === undefined) waiting.set(fd, entry = Promise.withResolvers());
  if (!isRunning) run();
  return entry.promise;
}

async function run(): Promise<void> {
  isRunning = true;
  const view = new DataView(events.buffer);
  while (waiting.size > 0) {
    const count = await libc.epoll_wait(epoll, events, MOST_EVENTS);
    // A descriptor may be another socket's since the event: the caller tries again anyway.
    for (let i = 0; i < count; i++) wake(view.getInt32(i * EVENT_SIZE + DATA_AT, true));
  }
  isRunning = false;
}

function wake(fd: number): void {
  waiting.get(fd)?.resolve();
  waiting.delete(fd);
}
