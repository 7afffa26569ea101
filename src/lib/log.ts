import { pino, type Logger } from 'pino';

export type { Logger };

/** Keys whose values never reach the log, wherever they stand. */
const SECRET_KEYS = ['token', 'password', 'secret', 'authorization', 'psk', 'key'];

export type LogLevel = 'debug' | 'info' | 'warn' | 'error' | 'silent';

/** The root logger: JSON lines on standard output. Components take a `child({ component })`. */
export function createLogger(level: LogLevel): Logger {
  const paths = SECRET_KEYS.flatMap((key) => [key, `*.${key}`, `*.*.${key}`]);
  return pino({ level, redact: { paths, censor: '[redacted]' } });
}

/** A logger that says nothing, for tests and one-shot commands. */
export function silentLogger(): Logger {
  return pino({ level: 'silent' });
}
