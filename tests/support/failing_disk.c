/* A disk that fails: loaded before libc (LD_PRELOAD), it counts the calls that change files below one
   folder, and makes the n-th of them fail, write half of its bytes, or kill the process.

   The list of calls is in memory that a forked child shares with its parent, so it outlives a SIGKILL.
   stdio inside libc does not pass through here; nothing that the tests run writes by stdio. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* Calls that only some faults touch; WRITER: opening a file to write, and fsync. */
enum { READ = 1, REMOVE = 2, NAMES = 4, WRITER = 8 };

struct disk {
    char under[PATH_MAX]; /* watched folder, with a slash at its end */
    long fail_at;         /* number of the call, from 1; 0: none */
    int error;            /* errno; 0: SIGKILL; -1: a short write */
    int lasting;          /* all later calls fail, too */
    int ignored;          /* kinds that are not counted */
    volatile long calls;      /* so far, that were not ignored */
    volatile int failed; /* whether a fault has happened */
    char call[PATH_MAX + 32];
    volatile long logged; /* bytes of the log */
    char log[1 << 21];    /* a line for each call, ignored or not: kind, name, path below the folder */
};
static struct disk *disk;

struct disk *disk_share(void) {
    if (!disk)
        disk = mmap(NULL, sizeof *disk, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return disk;
}

void disk_arm(const char *under, long fail_at, int error, int lasting, int ignored) {
    struct disk *d = disk_share();
    memset(d, 0, offsetof(struct disk, log));
    d->log[0] = 0;
    snprintf(d->under, sizeof d->under, "%s", under);
    d->fail_at = fail_at, d->error = error, d->lasting = lasting, d->ignored = ignored;
}

const char *disk_log(void) { return disk->log; }
int disk_failed(void) { return disk->failed; }
const char *disk_call(void) { return disk->call; }

static void absolute(int folder, const char *path, char *out) {
    char link[64];
    ssize_t n = 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(out, PATH_MAX)) out[0] = 0;
        n = strlen(out);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        n = readlink(link, out, PATH_MAX - 1);
        if (n < 0) n = 0;
        out[n] = 0;
    }
    if (*path) snprintf(out + n, PATH_MAX - n, "/%s", path);
}

/* Whether this call is to fail, with errno set: 1, or 2 for a short write. */
static int fails(const char *name, int folder, const char *path, int kind, int writes) {
    char full[PATH_MAX];
    int saved = errno;
    if (!disk || !disk->under[0]) return 0;
    absolute(folder, path, full);
    errno = saved;
    size_t prefix = strlen(disk->under);
    if (strncmp(full, disk->under, prefix) != 0 || strncmp(full + prefix, "../", 3) == 0
        || strcmp(full + prefix, ".") == 0)
        return 0;
    char line[PATH_MAX + 32];
    long length = snprintf(line, sizeof line, "%d %s %s\n", kind, name, full + prefix);
    long at = __sync_fetch_and_add(&disk->logged, length);
    if (at + length < (long)sizeof disk->log) memcpy(disk->log + at, line, length + 1);
    if (kind & disk->ignored) return 0;
    long n = __sync_add_and_fetch(&disk->calls, 1);
    if (!disk->fail_at || n < disk->fail_at || (n > disk->fail_at && !disk->lasting)) return 0;
    if (!disk->failed) snprintf(disk->call, sizeof disk->call, "%s %s", name, full);
    disk->failed = 1;
    if (disk->error == 0) kill(getpid(), SIGKILL);
    if (disk->error == -1) return writes ? 2 : 0;
    errno = disk->error;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int kind = (flags & (O_ACCMODE | O_CREAT)) == O_RDONLY ? READ : WRITER; \
        if (fails("open", AT_FDCWD, path, kind, 0)) return -1; \
        return real(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int kind = (flags & (O_ACCMODE | O_CREAT)) == O_RDONLY ? READ : WRITER; \
        if (fails("open", folder, path, kind, 0)) return -1; \
        return real(folder, path, flags, mode); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

#define WRITING(name, extra, passed) \
    ssize_t name(int file, const void *data, size_t size extra) { \
        REAL(ssize_t, #name, int, const void *, size_t extra); \
        int fault = fails("write", file, "", 0, 1); \
        if (fault == 1) return -1; \
        if (fault == 2 && size > 1) size /= 2; \
        return real(file, data, size passed); \
    }
#define COMMA ,
WRITING(write, , )
WRITING(pwrite, COMMA off_t at, COMMA at)
WRITING(pwrite64, COMMA off64_t at, COMMA at)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int fault = fails("write", file, "", 0, 1);
    if (fault == 1) return -1;
    return real(file, parts, fault == 2 && count > 1 ? 1 : count);
}

#define ON_FILE(name, shown, kind, extra, passed) \
    int name(int file extra) { \
        REAL(int, #name, int extra); \
        if (fails(shown, file, "", kind, 0)) return -1; \
        return real(file passed); \
    }
ON_FILE(fsync, "fsync", WRITER, , )
ON_FILE(fdatasync, "fsync", WRITER, , )
ON_FILE(ftruncate, "truncate", NAMES, COMMA off_t size, COMMA size)
ON_FILE(ftruncate64, "truncate", NAMES, COMMA off64_t size, COMMA size)
ON_FILE(fchmod, "chmod", REMOVE, COMMA mode_t mode, COMMA mode)

#define ON_PATH(name, shown, kind, extra, passed) \
    int name(const char *path extra) { \
        REAL(int, #name, const char * extra); \
        if (fails(shown, AT_FDCWD, path, kind, 0)) return -1; \
        return real(path passed); \
    }
ON_PATH(mkdir, "mkdir", NAMES, COMMA mode_t mode, COMMA mode)
ON_PATH(truncate, "truncate", NAMES, COMMA off_t size, COMMA size)
ON_PATH(truncate64, "truncate", NAMES, COMMA off64_t size, COMMA size)
ON_PATH(chmod, "chmod", REMOVE, COMMA mode_t mode, COMMA mode)
ON_PATH(unlink, "unlink", REMOVE, , )
ON_PATH(rmdir, "rmdir", REMOVE, , )

#define ON_PATH_AT(name, shown, kind, type) \
    int name(int folder, const char *path, type more) { \
        REAL(int, #name, int, const char *, type); \
        if (fails(shown, folder, path, kind, 0)) return -1; \
        return real(folder, path, more); \
    }
ON_PATH_AT(mkdirat, "mkdir", NAMES, mode_t)
ON_PATH_AT(unlinkat, "unlink", REMOVE, int)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (fails("rename", AT_FDCWD, to, NAMES, 0)) return -1;
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (fails("rename", to_folder, to, NAMES, 0)) return -1;
    return real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    if (fails("rename", to_folder, to, NAMES, 0)) return -1;
    return real(from_folder, from, to_folder, to, flags);
}
