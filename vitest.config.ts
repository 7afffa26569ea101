import { defineConfig } from 'vitest/config';

/** They hold limits of time, which mean something only when nothing runs beside them. */
const FIGURES = ['integration/db/point-listing.test.ts', 'integration/**/*.figures.test.ts'];

/**
 * `unit` needs nothing but Node and the built addon; `integration` starts real servers (qemu-nbd, nbdkit, Redis,
 * MariaDB) and needs root; `figures` are those of them that run alone. A missing tool is a failure, never a skip.
 * Forked processes, because the addon holds threads and a crash must not take the reporter with it.
 */
export default defineConfig({
  test: {
    teardownTimeout: 20_000,
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/**/*.test.ts'],
          pool: 'forks',
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
      {
        test: {
          name: 'integration',
          include: ['integration/**/*.test.ts'],
          exclude: FIGURES,
          pool: 'forks',
          maxWorkers: 2,
          // Against hanging only: what must be quick is measured where it is tested. A busy machine is five times slower.
          testTimeout: 180_000,
          hookTimeout: 180_000,
        },
      },
      {
        test: {
          name: 'figures',
          include: FIGURES,
          pool: 'forks',
          maxWorkers: 1,
          testTimeout: 120_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
});
