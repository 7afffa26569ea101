import { defineConfig } from 'vitest/config';

/**
 * Two projects: `unit` needs nothing but Node and the built addon; `integration` starts real servers
 * (qemu-nbd, nbdkit, Redis, MariaDB) and needs root. A missing tool is a failure there, never a skip.
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
          testTimeout: 30_000,
          hookTimeout: 60_000,
        },
      },
      {
        test: {
          name: 'integration',
          include: ['integration/**/*.test.ts'],
          pool: 'forks',
          maxWorkers: 2,
          testTimeout: 30_000,
          hookTimeout: 60_000,
        },
      },
    ],
  },
});
