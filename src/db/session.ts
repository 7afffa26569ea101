import type { Knex } from 'knex';
import type { Clock } from '../lib/clock.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import type { Engine } from './connection.js';
import { isContention, toDatabaseError, type ConstraintMeaning } from './database-errors.js';

const CONTENTION_TIMEOUT_MS = 30_000;
const CONTENTION_INTERVAL_MS = 15;
const SLOW_MS = 1000;

/**
 * The way of every table to the database: names what is done, turns driver errors into ours, and
 * repeats what lost against another writer. Repeating is safe because `work` is one statement or one
 * transaction, undone as a whole before; it must do nothing else.
 */
export class Session {
  readonly engine: Engine;
  readonly #knex: Knex;
  readonly #logger: Logger;
  readonly #clock: Clock;

  constructor(knex: Knex, options: { engine: Engine; logger: Logger; clock: Clock }) {
    this.#knex = knex;
    this.engine = options.engine;
    this.#logger = options.logger;
    this.#clock = options.clock;
  }

  /** One statement. */
  run<T>(what: string, work: (db: Knex) => Promise<T>, meaning?: ConstraintMeaning): Promise<T> {
    return this.#attempt(what, () => work(this.#knex), meaning);
  }

  /** All of `work` or nothing. Only through the given transaction: SQLite has no second connection. */
  transaction<T>(
    what: string,
    work: (trx: Knex.Transaction) => Promise<T>,
    meaning?: ConstraintMeaning,
  ): Promise<T> {
    return this.#attempt(what, () => this.#knex.transaction(work), meaning);
  }

  async #attempt<T>(what: string, work: () => Promise<T>, meaning?: ConstraintMeaning): Promise<T> {
    const startMs = this.#clock.monotonicMs();
    try {
      const { value } = await pollUntil(() => tryOnce(work), {
        timeoutMs: CONTENTION_TIMEOUT_MS,
        intervalMs: CONTENTION_INTERVAL_MS,
        what: `${what}: a free lock`,
      });
      return value;
    } catch (error) {
      if (isErrorCode(error, 'TIMEOUT')) {
        throw new AppError('DATABASE_UNAVAILABLE', `${what}: others kept the rows locked`, { cause: error });
      }
      throw toDatabaseError(error, what, meaning);
    } finally {
      const durationMs = Math.round(this.#clock.monotonicMs() - startMs);
      if (durationMs > SLOW_MS) this.#logger.warn({ what, durationMs }, 'slow database work');
    }
  }
}

async function tryOnce<T>(work: () => Promise<T>): Promise<{ value: T } | undefined> {
  try {
    return { value: await work() };
  } catch (error) {
    if (isContention(error)) return undefined;
    throw error;
  }
}
