/**
 * Waits for any number of sockets in one thread, epoll(7).
 *
 * Deno runs calls that wait in a pool of 32 threads, which file reads and name look-ups share: one
 * waiting thread for each socket would fill it.
 *
 * @module
 */

import {
  close,
  epoll_create1,
  epoll_ctl,
  epoll_wait,
  eventfd,
  eventfd_write,
  unwrap,
} from "./libc.ts";

const EPOLL_CTL_ADD = 1, EPOLL_CTL_DEL = 2;
// Edge-triggered: a copy of a sent packet on the error queue would otherwise report for ever.
const EPOLLIN = 0x1, EPOLLOUT = 0x4, EPOLLET = 0x80000000;
// struct epoll_event { uint32_t events; uint64_t data; }, packed on x86_64 only
const [EVENT_SIZE, DATA_AT] = Deno.build.arch === "x86_64" ? [12, 4] : [16, 8];
const MOST_EVENTS = 64;

/** The sockets that are waited for, and the one call that waits. */
export class Poller {
  readonly #epoll: number;
  readonly #waker: number;
  // A field, so that it stays referenced while the other thread writes to it.
  readonly #events = new Uint8Array(EVENT_SIZE * MOST_EVENTS);
  readonly #waiting = new Map<number, PromiseWithResolvers<void>>();
  #isRunning = false;

  /** Opens its two descriptors. @throws {LibcError} they are not to be had */
  constructor() {
    this.#waker = unwrap("eventfd", eventfd());
    const epoll = epoll_create1();
    if (epoll < 0) close(this.#waker);
    this.#epoll = unwrap("epoll_create1", epoll);
    this.add(this.#waker);
  }

  /** Begins to watch a descriptor. @throws {LibcError} the kernel refuses */
  add(fd: number): void {
    const event = new Uint8Array(EVENT_SIZE), view = new DataView(event.buffer);
    view.setUint32(0, EPOLLIN | EPOLLOUT | EPOLLET, true);
    view.setInt32(DATA_AT, fd, true);
    unwrap("epoll_ctl", epoll_ctl(this.#epoll, EPOLL_CTL_ADD, fd, event));
  }

  /** Ends it, before the descriptor is closed or handed on; a wait for it ends as well. */
  remove(fd: number): void {
    epoll_ctl(this.#epoll, EPOLL_CTL_DEL, fd, new Uint8Array(EVENT_SIZE));
    this.#end(fd);
    // The thread must not wait for nobody: it would keep the process from ending.
    if (this.#waiting.size === 0 && this.#isRunning) eventfd_write(this.#waker);
  }

  /** Waits for the next event of a descriptor: try the call first, and again after this. */
  next(fd: number): Promise<void> {
    let waiting = this.#waiting.get(fd);
    if (waiting === undefined) this.#waiting.set(fd, waiting = Promise.withResolvers());
    if (!this.#isRunning) this.#run();
    return waiting.promise;
  }

  async #run(): Promise<void> {
    this.#isRunning = true;
    const view = new DataView(this.#events.buffer);
    while (this.#waiting.size > 0) {
      const count = await epoll_wait(this.#epoll, this.#events, MOST_EVENTS);
      // A descriptor may be another socket's since the event: whoever waits tries again anyway.
      for (let i = 0; i < count; i++) this.#end(view.getInt32(i * EVENT_SIZE + DATA_AT, true));
    }
    this.#isRunning = false;
  }

  /** Ends the wait for a descriptor, if there is one. */
  #end(fd: number): void {
    this.#waiting.get(fd)?.resolve();
    this.#waiting.delete(fd);
  }
}

let poller: Poller | undefined;

/** The process's poller. @throws {LibcError} no descriptor is free for it */
export function thePoller(): Poller {
  return poller ??= new Poller();
}
