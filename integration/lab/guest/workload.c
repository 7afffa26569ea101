/* What the guest does: numbered records on two disks, the last of them, and how long a write takes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { RECORD_BYTES = 4096, RECORDS = 2048, REPORT_EVERY = 25, LATENCIES_A_LINE = 20 };

/* Everything but the checksum follows from the number, so that any torn or foreign record shows. */
struct record {
  uint64_t number;
  uint64_t checksum;
  uint64_t filler[RECORD_BYTES / 8 - 2];
};

static void fail(const char *what) {
  printf("hf: failed %s: %s\n", what, strerror(errno));
  exit(1);
}

static uint64_t next_random(uint64_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

static void make_record(struct record *record, uint64_t number) {
  uint64_t state = number * 0x9e3779b97f4a7c15u + 1;
  uint64_t sum = number;
  for (size_t i = 0; i < sizeof record->filler / 8; i++) {
    record->filler[i] = next_random(&state);
    sum = sum * 31 + record->filler[i];
  }
  record->number = number;
  record->checksum = sum;
}

static int open_records(const char *path) {
  int fd = open(path, O_RDWR | O_CREAT, 0644);
  if (fd < 0) fail(path);
  return fd;
}

/* The highest number of a whole record; 0 when there is none. Numbers before it that are not there are `missing`. */
static uint64_t last_record(const char *path, uint64_t *missing) {
  static struct record found, expected;
  static uint64_t numbers[RECORDS];
  int fd = open_records(path);
  uint64_t last = 0;
  for (int slot = 0; slot < RECORDS; slot++) {
    ssize_t length = pread(fd, &found, sizeof found, (off_t)slot * RECORD_BYTES);
    if (length < 0) fail(path);
    if (length != sizeof found || found.number == 0 || found.number % RECORDS != (uint64_t)slot) continue;
    make_record(&expected, found.number);
    if (memcmp(&found, &expected, sizeof found) != 0) continue;
    numbers[slot] = found.number;
    if (found.number > last) last = found.number;
  }
  close(fd);
  /* The oldest slot may be torn: it is where the next record goes. */
  *missing = 0;
  for (uint64_t back = 0; back < RECORDS - 1 && back < last; back++) {
    if (numbers[(last - back) % RECORDS] != last - back) ++*missing;
  }
  return last;
}

static void write_record(int fd, uint64_t number, const char *path) {
  static struct record record;
  make_record(&record, number);
  if (pwrite(fd, &record, sizeof record, (off_t)(number % RECORDS) * RECORD_BYTES) != sizeof record) fail(path);
  if (fsync(fd) != 0) fail(path);
}

/* Record n is durable on the first disk before it goes to the second: at any instant they differ by one at most. */
static void write_for_ever(const char *first, const char *second) {
  uint64_t missing;
  int fds[2] = {open_records(first), open_records(second)};
  for (uint64_t number = last_record(first, &missing) + 1;; number++) {
    write_record(fds[0], number, first);
    write_record(fds[1], number, second);
    if (number % REPORT_EVERY == 0) printf("hf: record %llu\n", (unsigned long long)number);
  }
}

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* Durable writes of 4 KiB at random places of a whole disk, whose content is lost. Milliseconds of each, many a line. */
static void measure_for_ever(const char *device, long pause_ms) {
  uint64_t size, state = 88172645463325252u;
  int fd = open(device, O_RDWR | O_DIRECT | O_DSYNC);
  if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) != 0) fail(device);
  uint64_t *block;
  if (posix_memalign((void **)&block, RECORD_BYTES, RECORD_BYTES) != 0) fail("memory");
  for (;;) {
    double took[LATENCIES_A_LINE];
    for (int i = 0; i < LATENCIES_A_LINE; i++) {
      for (size_t word = 0; word < RECORD_BYTES / 8; word++) block[word] = next_random(&state);
      off_t offset = (off_t)(next_random(&state) % (size / RECORD_BYTES)) * RECORD_BYTES;
      double start = now_ms();
      if (pwrite(fd, block, RECORD_BYTES, offset) != RECORD_BYTES) fail(device);
      took[i] = now_ms() - start;
      usleep((useconds_t)pause_ms * 1000);
    }
    printf("hf: ms");
    for (int i = 0; i < LATENCIES_A_LINE; i++) printf(" %.2f", took[i]);
    printf("\n");
  }
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc == 4 && strcmp(argv[1], "write") == 0) write_for_ever(argv[2], argv[3]);
  if (argc == 4 && strcmp(argv[1], "latency") == 0) measure_for_ever(argv[2], atol(argv[3]));
  if (argc != 3 || strcmp(argv[1], "last") != 0) return 2;
  uint64_t missing, last = last_record(argv[2], &missing);
  printf("%llu missing %llu\n", (unsigned long long)last, (unsigned long long)missing);
  return 0;
}
